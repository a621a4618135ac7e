"""Progress, logs and demos of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.audio.plot import plot_spectrogram
from stable_audio_lite.files import append_line
from training.task import Demo, RunConfig
from training.update import Health


class Monitor:
    """Progress bar, trackers, `losses.jsonl` and `demos`."""

    def __init__(self, accelerator: Accelerator, run: RunConfig, batch_size: int, start: int):
        from tqdm import tqdm

        self.accelerator, self.run = accelerator, run
        self.items_per_step = batch_size * accelerator.num_processes * run.accumulate
        main = accelerator.is_main_process
        self.bar = tqdm(total=run.steps, initial=start, unit="step", disable=not main, mininterval=1.0, smoothing=0.05)
        self.last = (time.monotonic(), start)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def restart(self, start: int) -> None:
        """Go on counting from `start`."""
        self.bar.n, self.last = start, (time.monotonic(), start)
        self.bar.refresh()

    def show(self, step: int, losses: dict[str, Tensor], health: Health) -> None:
        """Advance the bar; every `log_every` steps also average the losses over processes and write them."""
        self.bar.update()
        if step % self.run.log_every and step + 1 != self.run.steps:
            return
        # NaN: a metric for which a process had no items.
        device = self.accelerator.device
        gathered = {k: self.accelerator.gather(v.detach().float().reshape(1).to(device)) for k, v in losses.items()}
        figures = {k: float(v.nanmean()) for k, v in gathered.items() if not bool(v.isnan().all())}
        now, (then, last) = time.monotonic(), self.last
        figures |= {"updates/skipped": health.skipped, "updates/returns": health.returns}
        figures["items_per_second"] = (step + 1 - last) * self.items_per_step / max(now - then, 1e-9)
        self.last = (now, step + 1)
        name, value = next(iter(figures.items()))
        self.bar.set_postfix_str(f"{name} {value:.4f}, {figures['items_per_second']:.1f} items/s")
        self.write(step, figures)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Send figures to the trackers and append them to `losses.jsonl`."""
        if not figures:
            return
        self.accelerator.log(figures, step=step)
        if self.accelerator.is_main_process:
            row = {"step": step} | {k: float(f"{v:.8g}") for k, v in figures.items()}
            append_line(Path(self.run.output) / "losses.jsonl", json.dumps(row))

    def play(self, step: int, sounds: list[Demo]) -> None:
        """Write sounds and their spectrograms to `demos/step_N`, and to TensorBoard, which plays one channel."""
        folder = Path(self.run.output) / "demos" / f"step_{step + 1:08d}"
        for sound in sounds:
            write_audio(folder / f"{sound.name}.wav", sound.audio, sound.sample_rate)
            plot_spectrogram(folder / f"{sound.name}.png", sound.audio, sound.sample_rate, sound.name)
            if self.run.tracker == "tensorboard":
                from matplotlib.image import imread

                writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
                mono = sound.audio.mean(0, keepdim=True).clamp(-1, 1)
                writer.add_audio(f"demo/{sound.name}", mono, step, sound.sample_rate)
                picture = imread(str(folder / f"{sound.name}.png"))
                writer.add_image(f"demo/{sound.name}", picture, step, dataformats="HWC")
