"""Where the time of a decode step and of a prefill goes, part by part, from a JAX profiler trace.

`python -m tools.trace MODEL.gguf [--steps N] [--prompt-tokens M] [--streams B] [--out DIR]`

Prints, for one prefill of M tokens and for N decode steps of B streams that follow prompts of M tokens: each
part (a kernel by its name, or an operation of XLA's), its calls and microseconds a step without what runs
inside of it, the bytes of weights (in the device's format) and of cache that it must read, and its share of
the floor: those bytes at the speed of a large copy, measured in the same run, over its time. "between" is
time in which nothing ran. The trace and parts.json lie in DIR afterwards.

Profiling turns CUDA's command buffers off unless XLA is told otherwise: where it knows the flag, it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jaxmoe.config import ModelConfig
from jaxmoe.gguf import read_gguf
from jaxmoe.profiler import keep_command_buffers, profile
from server.settings import read_settings
from tools.environment import host_name, read_environment
from tools.player import Player, make_steps, open_model, random_ids
from tools.roofline import COPY_SIZE, cache_row_size, device_sizes, measure_bandwidth, part_sizes

if TYPE_CHECKING:
    from jaxmoe.step import Steps

WARM_STEPS = 8
SHOWN = 40  # parts in a table; parts.json has all


@dataclass(frozen=True)
class Event:
    """Something that ran on one line of a trace, in nanoseconds."""

    name: str
    start: float
    duration: float


@dataclass(frozen=True)
class Part:
    """One name of a trace, a step: `size` in bytes, None where it is not known what it must read."""

    name: str
    calls: float
    microseconds: float
    size: float | None = None

    def share(self, bandwidth: float) -> float | None:
        """Of the floor, at `bandwidth` bytes a second."""
        if not self.size or not self.microseconds:
            return None
        return self.size / bandwidth * 1e6 / self.microseconds


@dataclass(frozen=True)
class Profile:
    """The parts of one step, longest first, and the microseconds from its begin to its end."""

    title: str
    parts: tuple[Part, ...]
    span: float

    @property
    def busy(self) -> float:
        return sum(part.microseconds for part in self.parts)


# --- Reading a trace.


def read_lines(folder: Path) -> list[list[Event]]:
    """What ran on the device, line by line, in the newest trace below `folder`."""
    import jax

    path = max(folder.rglob("*.xplane.pb"), key=lambda one: one.stat().st_mtime)
    with warnings.catch_warnings():
        # types of the profiler's binding lack a module name
        warnings.simplefilter("ignore", DeprecationWarning)
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        if on_gpu:
            lines = [
                line.events for plane in on_gpu for line in plane.lines if line.name.startswith("Stream")
            ]
            return [list(_events(events)) for events in lines]
        # on a CPU operations run on several threads, each a line of its own, beside the profiler's own events
        lines = [line.events for plane in planes if plane.name == "/host:CPU" for line in plane.lines]
        return [list(_events(e for e in events if "hlo_op" in dict(e.stats))) for events in lines]


def _events(events: Iterable[Any]) -> Iterator[Event]:
    for event in events:
        yield Event(event.name, event.start_ns, event.duration_ns)


def self_times(events: Sequence[Event]) -> Iterator[tuple[str, float]]:
    """(name, nanoseconds without the events inside of it) of one line's events."""
    open_events: list[tuple[float, int]] = []
    names: list[str] = []
    left: list[float] = []
    for event in sorted(events, key=lambda one: (one.start, -one.duration)):
        while open_events and open_events[-1][0] <= event.start:
            open_events.pop()
        if open_events:
            # kernels of one stream may overlap: only what lies inside is the inner one's
            end, outer = open_events[-1]
            left[outer] -= min(event.duration, end - event.start)
        open_events.append((event.start + event.duration, len(left)))
        names.append(event.name)
        left.append(event.duration)
    yield from zip(names, left, strict=True)


def sum_up(title: str, lines: Sequence[Sequence[Event]], steps: int, sizes: Mapping[str, float]) -> Profile:
    """Sum the lines of `steps` steps up by name; `sizes` are the bytes each part reads a step."""
    calls: dict[str, int] = {}
    times: dict[str, float] = {}
    for line in lines:
        for name, duration in self_times(line):
            part = part_of(name, sizes)
            calls[part] = calls.get(part, 0) + 1
            times[part] = times.get(part, 0.0) + duration
    parts = [Part(name, calls[name] / steps, times[name] / steps / 1000, sizes.get(name)) for name in calls]
    events = [event for line in lines for event in line]
    first = min((event.start for event in events), default=0.0)
    last = max((event.start + event.duration for event in events), default=0.0)
    ordered = sorted(parts, key=lambda part: -part.microseconds)
    return Profile(title, tuple(ordered), (last - first) / steps / 1000)


def part_of(name: str, sizes: Mapping[str, float]) -> str:
    """The part that a kernel belongs to: `gate_up` and `gate_up_8` are one; unknown names are their own."""
    fitting = [part for part in sizes if name == part or name.startswith(part + "_")]
    return max(fitting, key=len, default=name)


# --- What each part must read.

_LAYER: Final = ("qkv", "attend_decode", "attn_output", "router", "gate_up", "down")


def decode_sizes(
    config: ModelConfig, weights: Mapping[str, int], *, streams: int, context: float, itemsize: int
) -> dict[str, float]:
    """Bytes that each part reads in a decode step of so many streams with `context` tokens in the cache."""
    cache = streams * context * cache_row_size(config, itemsize)
    return {**_unsized(), **part_sizes(weights, config, [streams]), "attend_decode": cache}


def fused_sizes(sizes: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The same by the kernels that ran, of which some read what several parts name.

    `experts` reads what gate_up and down do, `decode_row` what all layers do, attention's cache too.
    """
    called = list(names)
    for kernel, parts in (("experts", _LAYER[-2:]), ("decode_row", _LAYER)):
        if any(part_of(name, {kernel: 0.0}) == kernel for name in called):
            rest = {name: size for name, size in sizes.items() if name not in parts}
            return {**rest, kernel: sum(sizes[name] for name in parts)}
    return dict(sizes)


def prefill_sizes(
    config: ModelConfig, weights: Mapping[str, int], *, tokens: int, chunk: int, itemsize: int
) -> dict[str, float]:
    """Bytes that each part reads in a prefill in chunks, each of which reads all keys up to its end."""
    chunks = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    ends = [min(tokens, start + chunk) for start in range(0, tokens, chunk)]
    cache = sum(ends) * cache_row_size(config, itemsize)
    return {**_unsized(), **part_sizes(weights, config, chunks), "attend_prefill": cache}


def _unsized() -> dict[str, float]:
    """Parts that read neither weights nor cache worth naming, so that their kernels are summed up."""
    return dict.fromkeys(("norm_quantise", "combine", "group", "plan_decode", "prepare", "sample"), 0.0)


# --- Tracing.


def take_profiles(
    steps: Steps, *, num_steps: int, prompt_tokens: int, sizes: Sequence[Mapping[str, float]], out: Path
) -> list[Profile]:
    """One prefill and then `num_steps` decode steps of all slots; `sizes` of prefill and of decode."""
    player = Player(steps)
    slots = range(steps.num_slots)
    prompts = [random_ids(prompt_tokens, steps.vocab_size, (slot,)) for slot in slots]
    player.start(0, prompts[0])
    player.stop(0)
    with profile(out / "prefill"):
        player.start(0, prompts[0])
    for slot in slots[1:]:
        player.start(slot, prompts[slot])
    player.decode(slots, WARM_STEPS)
    with profile(out / "decode"):
        player.decode(slots, num_steps)
    titles = f"prefill of {prompt_tokens} tokens", f"a decode step of {steps.num_slots} streams"
    lines = read_lines(out / "prefill"), read_lines(out / "decode")
    names = [event.name for line in lines[1] for event in line]
    of_decode = fused_sizes(sizes[1], names)
    return [sum_up(titles[0], lines[0], 1, sizes[0]), sum_up(titles[1], lines[1], num_steps, of_decode)]


# --- What is printed.


def table(profiles: Sequence[Profile], bandwidth: float) -> str:
    """The profiles for the eye; `bandwidth` in bytes a second."""
    lines = []
    for one in profiles:
        lines.append(f"{one.title}: {one.span:.1f} us, copies at {bandwidth / 1e9:.0f} GB/s")
        lines.append(f"{'part':<40} {'calls':>7} {'us':>10} {'us a call':>10} {'MB':>9} {'floor':>6}")
        lines += [_row(part, bandwidth) for part in one.parts[:SHOWN]]
        if rest := one.parts[SHOWN:]:
            lines.append(f"{f'{len(rest)} others':<40} {'':>7} {sum(p.microseconds for p in rest):>10.1f}")
        lines.append(f"{'between':<40} {'':>7} {one.span - one.busy:>10.1f}")
        lines.append("")
    return "\n".join(lines)


def _row(part: Part, bandwidth: float) -> str:
    size = f"{part.size / 1e6:.2f}" if part.size else "-"
    share = part.share(bandwidth)
    floor = "-" if share is None else f"{share:.2f}"
    each = part.microseconds / part.calls
    name = part.name if len(part.name) <= 40 else part.name[:37] + "..."
    return f"{name:<40} {part.calls:>7.1f} {part.microseconds:>10.1f} {each:>10.2f} {size:>9} {floor:>6}"


def document(profiles: Sequence[Profile], bandwidth: float, model: str, flags: str) -> dict[str, Any]:
    """The profiles with the machine they were taken on."""
    environment = read_environment()
    return {
        "machine": host_name(environment),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment,
        "model": model,
        "flags": flags,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "profiles": [
            {
                "title": one.title,
                "span_us": round(one.span, 2),
                "parts": [{**asdict(part), "floor_share": part.share(bandwidth)} for part in one.parts],
            }
            for one in profiles
        ],
    }


def trace(path: Path, *, num_steps: int, prompt_tokens: int, streams: int, out: Path) -> list[Profile]:
    """Load a model file and profile it; the environment's settings hold but for slots and context."""
    most = prompt_tokens + WARM_STEPS + num_steps + 1
    given = read_settings(os.environ).engine
    asked = replace(given, num_slots=streams, context_length=most)
    model, config = open_model(path, most)
    pages = streams * -(-most // asked.page_length)
    steps = make_steps(model, config, asked, num_pages=pages)
    steps.warm()
    weights = device_sizes(read_gguf(path))
    chunk = steps.shapes.prefill_chunk
    itemsize = {"float32": 4, "bfloat16": 2}[steps.shapes.cache_dtype]
    context = prompt_tokens + WARM_STEPS + num_steps / 2
    sizes = (
        prefill_sizes(config, weights, tokens=prompt_tokens, chunk=chunk, itemsize=itemsize),
        decode_sizes(config, weights, streams=streams, context=context, itemsize=itemsize),
    )
    return take_profiles(steps, num_steps=num_steps, prompt_tokens=prompt_tokens, sizes=sizes, out=out)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.trace", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--steps", type=_positive, default=20, help="decode steps to trace")
    parser.add_argument("--prompt-tokens", type=_positive, default=512)
    parser.add_argument("--streams", type=_positive, default=1, help="that decode together")
    parser.add_argument("--out", type=Path, default=Path("out/trace"), metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    asked = _arguments(argv)
    if not keep_command_buffers():
        print("this XLA has no flag that keeps command buffers while profiling", file=sys.stderr)
    try:
        bandwidth = measure_bandwidth(COPY_SIZE)
        profiles = trace(
            asked.model,
            num_steps=asked.steps,
            prompt_tokens=asked.prompt_tokens,
            streams=asked.streams,
            out=asked.out,
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(profiles, bandwidth))
    found = document(profiles, bandwidth, asked.model.name, os.environ.get("XLA_FLAGS", ""))
    (asked.out / "parts.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
