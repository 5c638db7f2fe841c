# SPDX-License-Identifier: Apache-2.0
"""The demo's video files: demo.mp4 where OpenCV has an encoder, and demo.gif for web pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from PIL import Image

from tts_policy.sim.demo_frames import HEIGHT, SLOWDOWN, WIDTH, Frame, FrameRenderer, Scene
from tts_policy.sim.demo_pictures import STYLE
from tts_policy.sim.demo_process import DemoError

HOLD_S = 2.0
GIF_WIDTH = 800
GIF_FRAMES = 60
GIF_BYTES = 3_000_000


def write_video(scene: Scene, folder: Path) -> list[Path]:
    """Write demo.mp4 and demo.gif; returns what was written.

    Raises
    ------
    DemoError
        for an episode without a single frame or tick.

    """
    record = scene.record
    if not record.images or not record.ticks or not record.states:
        raise DemoError(
            f'seed {record.seed}: a video needs frames, joint states and ticks, got '
            f'{len(record.images)}, {len(record.states)} and {len(record.ticks)}'
        )
    rate = 1.0 / (scene.bundle.contract.observation.period_s * SLOWDOWN)
    movie = _Movie(folder / 'demo.mp4', rate)
    small = []
    with rc_context(STYLE):
        renderer = FrameRenderer(scene)
        last = renderer.frames - 1
        every = -(-renderer.frames // GIF_FRAMES)
        for index in range(renderer.frames):
            frame = renderer.render(index)
            movie.add(frame)
            # Counted from the end, so that the outcome is always seen.
            if (last - index) % every == 0:
                small.append(_shrink(frame))
    for _ in range(round(HOLD_S * rate)):
        movie.add(frame)
    written = [folder / 'demo.mp4'] if movie.close() else []
    return [*written, _write_gif(small, folder / 'demo.gif', every / rate)]


class _Movie:
    """An mp4 file, if OpenCV is there and can encode one."""

    def __init__(self, path: Path, rate: float) -> None:
        self._writer: Any = None
        try:
            import cv2
        except ImportError:
            return
        self._to_bgr = lambda frame: cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), rate, (WIDTH, HEIGHT))
        self._writer = writer if writer.isOpened() else None

    def add(self, frame: Frame) -> None:
        """Append a picture."""
        if self._writer is not None:
            self._writer.write(self._to_bgr(frame))

    def close(self) -> bool:
        """Finish the file; whether there is one."""
        if self._writer is not None:
            self._writer.release()
        return self._writer is not None


def _shrink(frame: Frame) -> Any:
    size = (GIF_WIDTH, GIF_WIDTH * HEIGHT // WIDTH)
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


def _write_gif(frames: list[Any], path: Path, frame_s: float) -> Path:
    """Write pictures with one palette, smaller until the file is small enough."""
    for scale in (1.0, 0.8, 0.6):
        size = tuple(round(scale * side) for side in frames[0].size)
        resized = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
        palette = _palette(resized)
        indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in resized]
        durations = [round(1e3 * frame_s)] * (len(indexed) - 1) + [round(1e3 * HOLD_S)]
        indexed[0].save(
            path,
            save_all=True,
            append_images=indexed[1:],
            duration=durations,
            loop=0,
            optimize=False,
        )
        if path.stat().st_size <= GIF_BYTES:
            break
    return path


def _palette(frames: list[Any]) -> Any:
    """256 colours of the first, middle and last picture together."""
    chosen = (frames[0], frames[len(frames) // 2], frames[-1])
    sheet = Image.new('RGB', (chosen[0].width, sum(frame.height for frame in chosen)))
    for at, frame in enumerate(chosen):
        sheet.paste(frame, (0, at * frame.height))
    return sheet.quantize(256, method=Image.Quantize.MEDIANCUT)
