# SPDX-License-Identifier: Apache-2.0
"""One episode as a video: what the robot's camera sees, beside the joints and the plan.

`write_video` writes demo.gif, and demo.mp4 where OpenCV can encode one. Axes, names and grids are
drawn once; for every camera frame only what moves is drawn over that background. Positions on the
page are pixels from its upper left corner.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from tts_policy.policy.plan import plan_rgb
from tts_policy.sim.demo.pictures import (
    GRID,
    INK,
    MUTED,
    STYLE,
    PlanColumns,
    class_legend,
    grid_lines,
    label_plan_axes,
)
from tts_policy.sim.demo.processes import DemoError
from tts_policy.sim.demo.variants import DemoBundle, Variant
from tts_policy.sim.panda import FINGER_JOINT

if TYPE_CHECKING:
    from tts_policy.sim.demo.driver import EpisodeRecord

WIDTH, HEIGHT, DPI = 1280, 720, 100
CURSOR = '#BB5566'
SLOWDOWN = 2
AFTER_END_S = 0.3
FINGER_AXIS_MM = (-4.0, 44.0)

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """What to show."""

    record: EpisodeRecord
    variant: Variant
    bundle: DemoBundle
    clock: str


class _Curves:
    """One panel of joints over time: measured up to now, set-points of the chunk ahead."""

    def __init__(self, axes: Any, scene: Scene, columns: list[int], scale: float, own: bool):
        """Prepare lines; `own` shows positions relative to the start."""
        record = scene.record
        self._axes, self._columns = axes, columns
        self._start_ns = record.states[0][0]
        self._stamps = np.array([stamp for stamp, _ in record.states])
        self._seconds = (self._stamps - self._start_ns) * 1e-9
        values = np.array([state for _, state in record.states])
        self._offset = values[0] if own else np.zeros(values.shape[1])
        self._scale = scale
        self._measured = self._shown(values)
        self._limits()
        first, last = 0.08, 0.82
        colours = colormaps['viridis'](np.linspace(first, last, max(2, len(columns))))
        self.lines, self._executed, self._tail = [], [], []
        for colour in colours[: len(columns)]:
            new = {'color': colour, 'animated': True}
            self.lines += axes.plot([], [], lw=1.8, **new)
            self._executed += axes.plot([], [], ls='none', marker='o', ms=3.2, **new)
            self._tail += axes.plot([], [], ls='none', marker='o', ms=2.2, alpha=0.35, **new)
        self._bounds = axes.plot([], [], color=MUTED, lw=0.8, ls=(0, (3, 2)), animated=True)[0]
        self._cursor = axes.axvline(0.0, color=CURSOR, lw=1.6, animated=True)

    def _shown(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return (self._scale * (values - self._offset))[:, self._columns]

    def _limits(self) -> None:
        low, high = float(self._measured.min()), float(self._measured.max())
        margin = max(0.12 * (high - low), 1e-3)
        self._axes.set_ylim(low - margin, high + margin)
        self._axes.set_xlim(0.0, self._seconds[-1] + AFTER_END_S)
        self._axes.grid(color=GRID, lw=0.8)
        self._axes.set_axisbelow(True)

    def update(self, stamp_ns: int, command: Any, next_ns: int, bounds_s: list[float]) -> None:
        """Show the state at a stamp."""
        upto = bisect_right(self._stamps, stamp_ns)
        due_s = values = None
        if command is not None:
            ahead = command.due_ns > stamp_ns
            due_ns = command.due_ns[ahead]
            due_s, values = (
                (due_ns - self._start_ns) * 1e-9,
                self._shown(command.positions)[ahead],
            )
            executed = due_ns <= next_ns
        for j, line in enumerate(self.lines):
            line.set_data(self._seconds[:upto], self._measured[:upto, j])
            if due_s is not None and values is not None:
                self._executed[j].set_data(due_s[executed], values[executed, j])
                self._tail[j].set_data(due_s[~executed], values[~executed, j])
        low, high = self._axes.get_ylim()
        self._bounds.set_data(
            [x for bound in bounds_s for x in (bound, bound, np.nan)],
            [low, high, np.nan] * len(bounds_s),
        )
        now_s = (stamp_ns - self._start_ns) * 1e-9
        self._cursor.set_xdata([now_s, now_s])

    def draw(self) -> None:
        """Draw what moves."""
        moving = (self._bounds, *self._tail, *self._executed, *self.lines, self._cursor)
        for artist in moving:
            self._axes.draw_artist(artist)


class FrameRenderer:
    """Turns stamps of camera frames into pictures [HEIGHT, WIDTH, 3]."""

    def __init__(self, scene: Scene) -> None:
        """Lay out the page."""
        self._scene = scene
        self._figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        self._canvas = FigureCanvasAgg(self._figure)
        self._texts: dict[str, Any] = {}
        self._period_ns = round(scene.bundle.contract.observation.period_s * 1e9)
        self._image_stamps = [stamp_ns for stamp_ns, _ in scene.record.images]
        self._head()
        self._camera()
        self._joints()
        self._plan()
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self._figure.bbox)

    def _axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes by pixels from the upper left corner."""
        return self._figure.add_axes(
            (left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT)
        )

    def _write(self, x: float, y: float, text: str, **style: Any) -> Any:
        style = {'va': 'baseline', 'ha': 'left', **style}
        return self._figure.text(x / WIDTH, 1 - y / HEIGHT, text, **style)

    def _moving(self, key: str, x: float, y: float, **style: Any) -> None:
        self._texts[key] = self._write(x, y, '', animated=True, **style)

    def _head(self) -> None:
        scene = self._scene
        self._write(40, 40, 'Test-time sparse diffusion policy', fontsize=15, fontweight='bold')
        about = (
            f'{scene.variant.title}, seed {scene.record.seed}, {scene.clock}, '
            f'shown at 1/{SLOWDOWN} speed'
        )
        self._write(40, 62, about, fontsize=9.5, color=MUTED)
        self._moving('time', 1245, 40, fontsize=15, fontweight='bold', ha='right')
        self._moving('tick', 1245, 62, fontsize=9.5, color=MUTED, ha='right')

    def _camera(self) -> None:
        axes = self._axes(40, 84, 480, 480)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, color=GRID)
        image = self._scene.record.images[0][1]
        self._image = axes.imshow(image, interpolation='bicubic', animated=True)
        height, width = image.shape[:2]
        self._write(
            40,
            582,
            f"the robot's camera as the policy sees it, {width} x {height} pixels",
            fontsize=9,
            color=MUTED,
        )
        for x, key, caption in (
            (40, 'latency', 'latency of this tick'),
            (210, 'reused', 'of the blocks reused'),
            (380, 'flops', 'of the dense FLOPs'),
        ):
            self._moving(key, x, 648, fontsize=24, fontweight='bold')
            self._write(x, 670, caption, fontsize=9, color=MUTED)

    def _joints(self) -> None:
        names = self._scene.record.joints
        finger = [j for j, name in enumerate(names) if name == FINGER_JOINT]
        arm = [j for j in range(len(names)) if j not in finger]
        top, bottom = self._axes(620, 112, 625, 190), self._axes(620, 322, 625, 66)
        self._curves = [_Curves(top, self._scene, arm, 1.0, own=True)]
        top.set_ylabel('arm, from start\n[rad]')
        top.tick_params(labelbottom=False, labelsize=8)
        top.legend(
            self._curves[0].lines,
            [f'joint {1 + i}' for i in range(len(arm))],
            loc='lower left',
            bbox_to_anchor=(-0.01, 1.0),
            ncols=len(arm),
            fontsize=8,
            handlelength=1.0,
            columnspacing=0.9,
            handletextpad=0.4,
        )
        if finger:
            self._curves.append(_Curves(bottom, self._scene, finger, 1e3, own=False))
            bottom.set_ylim(FINGER_AXIS_MM)
            bottom.set_yticks((0, 20, 40))
            bottom.set_ylabel('finger\n[mm]')
        bottom.set_xlabel(
            'time [s]      line: measured    dots: set-points ahead, faint if '
            'replanned before    dashed: tick',
            fontsize=8.5,
        )
        bottom.tick_params(labelsize=8)
        self._figure.align_ylabels([top, bottom])

    def _plan(self) -> None:
        report = self._scene.record.ticks[0]
        plan, columns = np.asarray(report['plan']), PlanColumns.of(report)
        axes = self._plan_axes = self._axes(620, 478, 625, 156)
        axes.set_facecolor('#F4F6F8')
        self._cells = axes.imshow(
            plan_rgb(plan), aspect='auto', interpolation='nearest', animated=True
        )
        self._grid = grid_lines(len(plan), columns)
        self._grid.set_animated(True)
        axes.add_collection(self._grid)
        label_plan_axes(axes, len(plan), columns, 6.0, INK)
        axes.set_ylabel('denoising step')
        self._write(620, 467, 'Plan of this tick', fontsize=9.5, fontweight='bold')
        about = f'residual block: kind and decoder layer ({columns.legend})'
        self._write(932, 685, about, fontsize=8.5, ha='center')
        entries = class_legend()
        for patch in entries:
            patch.set_label(str(patch.get_label()).partition(':')[0])
        self._figure.legend(
            handles=entries,
            loc='lower right',
            bbox_to_anchor=(1251 / WIDTH, 1 - 475 / HEIGHT),
            ncols=len(entries),
            fontsize=8.5,
            handlelength=1.1,
            handleheight=1.1,
            columnspacing=1.2,
            borderaxespad=0.0,
        )

    def _say(self, key: str, text: str, colour: str = INK) -> None:
        self._texts[key].set_text(text)
        self._texts[key].set_color(colour)

    def _tell(self, tick: dict[str, Any] | None, index: int, now_s: float, last: bool) -> None:
        record = self._scene.record
        self._say('time', f't = {now_s:.2f} s' + ('  done' if last and record.success else ''))
        if tick is None:
            for key in ('latency', 'reused', 'flops'):
                self._say(key, '–', MUTED)
            self._say('tick', 'before the first tick', MUTED)
            return
        self._say('latency', f'{1e3 * tick["latency_s"]:.0f} ms')
        self._say('reused', f'{100 * tick["sparsity"]:.0f} %')
        self._say('flops', f'{100 * tick["flops"] / tick["dense_flops"]:.0f} %')
        dense = ', dense to fill the caches' if index == 0 else ''
        self._say('tick', f'tick {index + 1} of {len(record.ticks)}{dense}', MUTED)

    @property
    def frames(self) -> int:
        """Pictures of the whole episode, one per period of the camera."""
        states = self._scene.record.states
        return 1 + (states[-1][0] - states[0][0]) // self._period_ns

    def render(self, frame: int) -> Frame:
        """Picture number `frame`; where the camera dropped one, it shows the one before."""
        record = self._scene.record
        start_ns = record.states[0][0]
        stamp_ns = start_ns + frame * self._period_ns
        seen = bisect_right(self._image_stamps, stamp_ns)
        self._image.set_data(record.images[max(0, seen - 1)][1])
        # A chunk is known once it was computed: at once in lockstep, later on the real clock.
        begun = [
            tick
            for tick in record.ticks
            if tick['stamp_ns'] + max(0.0, tick['observation_age_s']) * 1e9 <= stamp_ns
        ]
        tick = begun[-1] if begun else None
        command = None
        if tick is not None:
            command = next((c for c in record.commands if c.stamp_ns == tick['stamp_ns']), None)
            self._cells.set_data(plan_rgb(tick['plan']))
        interval_ns = round(self._scene.bundle.deadline_s * 1e9)
        next_ns = stamp_ns if command is None else command.stamp_ns + interval_ns
        bounds_s = [(t['stamp_ns'] - start_ns) * 1e-9 for t in begun]
        for curves in self._curves:
            curves.update(stamp_ns, command, next_ns, bounds_s)
        self._tell(tick, len(begun) - 1, frame * self._period_ns * 1e-9, frame == self.frames - 1)
        return self._compose(plan=tick is not None)

    def _compose(self, plan: bool) -> Frame:
        self._canvas.restore_region(self._background)
        self._image.axes.draw_artist(self._image)
        for curves in self._curves:
            curves.draw()
        if plan:
            self._plan_axes.draw_artist(self._cells)
            self._plan_axes.draw_artist(self._grid)
        for text in self._texts.values():
            self._figure.draw_artist(text)
        picture: Frame = np.asarray(self._canvas.buffer_rgba())[..., :3].copy()
        return picture


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
            f'seed {record.seed}: expected frames, joint states and ticks for a video, got '
            f'{len(record.images)}, {len(record.states)} and {len(record.ticks)}'
        )
    rate = 1.0 / (scene.bundle.contract.observation.period_s * SLOWDOWN)
    path = folder / 'demo.mp4'
    movie = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), rate, (WIDTH, HEIGHT))
    small = []
    with rc_context(STYLE):
        renderer = FrameRenderer(scene)
        last = renderer.frames - 1
        every = -(-renderer.frames // GIF_FRAMES)
        for index in range(renderer.frames):
            frame = renderer.render(index)
            movie.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            # Counted from the end, so that the outcome is always seen.
            if (last - index) % every == 0:
                small.append(_shrink(frame))
    for _ in range(round(HOLD_S * rate)):
        movie.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    written = [path] if movie.isOpened() else []
    movie.release()
    return [*written, _write_gif(small, folder / 'demo.gif', every / rate)]


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
