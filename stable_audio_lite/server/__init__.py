"""The page and the service: models that are loaded once, a queue with one worker, and two ways to ask it for sound."""
