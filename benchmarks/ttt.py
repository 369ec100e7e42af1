"""What per-document test-time training gains, at which settings, and what its schedule saves.

    python benchmarks/ttt.py [CHECKPOINT] [--repeats=1] [--only=schedules] [--out=FILE]
                             [--settings="lora_lr=0.003;lora_lr=0.003,stride=64"] [flags of evaluate.py]

Schedules: the same model, kernels and documents, in turn, medians over the repeats. "continuous" is what
evaluate.py does. "neighbours" sorts documents by length and runs --slots of them in step, as many windows as
the longest has, each filled up to the length of its. "neighbours, ended ones dropped" leaves out those
that have ended. Settings: ttt-lora and stride for each, with the gain of one over the other.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate as ev
import train_gpt as tg
from data.shards import user_path

WORLD = tg.World()


def neighbours(documents: list, slots: int, tokens: int, drop: bool = False):
    """Batches of turns for documents that run in step; `tokens` is not heeded."""
    ordered = sorted(documents, key=len, reverse=True)
    for first in range(0, len(ordered), slots):
        group = ordered[first : first + slots]
        for i, longest in enumerate(group[0]):
            size = longest.hi - longest.lo
            idle = ev.Window(0, size, size)  # any tokens, of which none is scored
            yield [ev.Turn(slot, windows[i] if i < len(windows) else idle, i == 0, i + 1 < len(windows))
                   for slot, windows in enumerate(group) if i < len(windows) or not drop]


SCHEDULES = {
    "continuous": ev.continuous_batches,
    "neighbours": neighbours,
    "neighbours, ended ones dropped": partial(neighbours, drop=True),
}


def timed(function, hardware: tg.Hardware) -> tuple[float, object]:
    hardware.synchronize()
    start = time.perf_counter()
    out = function()
    hardware.synchronize()
    return time.perf_counter() - start, out


def ttt_lora(model: ev.AdaptedGPT, val: tg.Validation, options: ev.Options, schedule) -> float:
    """The sum of nats by this schedule."""
    room = options.slots * (options.context + ev.BLOCK)  # of what neighbours run at a time
    evaluation = ev.Evaluation(model, val, replace(options, batch=max(options.batch, room)), WORLD)
    evaluation.options = options
    evaluation.ttt_lora(schedule)
    return evaluation.collect().sum()


def compare_schedules(model: ev.AdaptedGPT, options: ev.Options, hardware: tg.Hardware, repeats: int) -> dict:
    """{schedule: seconds of each repeat, batches, tokens run and nats}."""
    out, val = {}, ev.load_documents(model.cfg, options.every)
    documents = ev.deal_documents(ev.Evaluation(model, val, options, WORLD).strides(), WORLD)
    for name, schedule in SCHEDULES.items():
        batches = list(schedule(documents, options.slots, options.batch))
        run = sum(turn.window.blocks * ev.BLOCK for batch in batches for turn in batch)
        out[name] = {"seconds": [], "batches": len(batches), "tokens": run}
        ttt_lora(model, ev.synthetic_documents(model.cfg, options), options, schedule)  # warms up
    for _ in range(repeats):
        for name, schedule in SCHEDULES.items():
            seconds, nats = timed(partial(ttt_lora, model, val, options, schedule), hardware)
            out[name]["seconds"].append(seconds)
            out[name]["nats"] = nats
    return out


def schedule_table(results: dict) -> str:
    base = statistics.median(results["continuous"]["seconds"])
    lines = ["| schedule | seconds | continuous is faster by | batches | tokens run | nats |",
             "|---|--:|--:|--:|--:|--:|"]
    for name, row in results.items():
        seconds = statistics.median(row["seconds"])
        lines.append(f"| {name} | {seconds:.1f} | {seconds / base:.2f} x | {row['batches']:,} | "
                     f"{row['tokens']:,} | {row['nats']:.1f} |")
    return "\n".join(lines)


def parse_settings(text: str) -> list[dict]:
    """Of each point the changed options, of their types. Raises UserError."""
    kinds = {field.name: field.type for field in fields(ev.Options)}
    points = [dict(pair.split("=") for pair in point.split(",") if pair) for point in text.split(";")]
    try:
        return [{name: kinds[name](value) for name, value in point.items()} for point in points]
    except (KeyError, ValueError) as error:
        raise tg.UserError(f"--settings={text}: {error}: expected flags of evaluate.py and numbers") from None


def compare_settings(model: ev.AdaptedGPT, options: ev.Options, points: list[dict], hardware: tg.Hardware):
    """For each point, once it is known: loss with ttt-lora, its gain over stride, and its seconds."""
    strides, val = {}, ev.load_documents(model.cfg, options.every)
    for point in points:
        own = replace(options, **point)
        key = own.context, own.stride
        if key not in strides:
            strides[key] = ev.measure("stride", model, val, own, hardware, WORLD)[0]["loss"]
        row, _ = ev.measure("ttt-lora", model, val, own, hardware, WORLD)
        yield {"point": point, "loss": row["loss"], "gain": strides[key] - row["loss"],
               "seconds": row["seconds"]}


def setting_line(row: dict) -> str:
    setting = " ".join(f"{name}={value}" for name, value in row["point"].items()) or "defaults"
    return f"| {setting} | {row['loss']:.4f} | {row['gain']:+.4f} | {row['seconds']:.1f} |"


def save(results: dict, path: Path | None):
    if path:
        path.write_text(json.dumps(results, indent=1))


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("schedules", "settings"))
    parser.add_argument("--settings", default="lora_lr=0.0003;lora_lr=0.001;lora_lr=0.003")
    parser.add_argument("--out", type=user_path)
    args, flags = parser.parse_known_args()
    try:
        points = parse_settings(args.settings)
        checkpoint, given = ev.parse_options([*flags, "--methods=ttt-lora"])
        if "script" in given:
            raise tg.UserError("--script: this takes train_gpt.py beside evaluate.py; leave the flag out")
        _, model, options, hardware = ev.load(checkpoint, given, WORLD)
        results = {"device": hardware.name, "torch": tg.torch.__version__}
        if args.only != "settings":
            results["schedules"] = compare_schedules(model, options, hardware, args.repeats)
            print(schedule_table(results["schedules"]), flush=True)
            save(results, args.out)
        if args.only != "schedules":
            results["settings"] = []
            print("| setting | loss | gain over stride | seconds |\n|---|--:|--:|--:|", flush=True)
            for row in compare_settings(model, options, points, hardware):
                results["settings"].append(row)
                print(setting_line(row), flush=True)
                save(results, args.out)
    except tg.UserError as error:
        print(f"ttt.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
