"""Trainers: one loop, and one short file for each thing trained."""
