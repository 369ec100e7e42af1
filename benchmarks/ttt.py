"""What per-document test-time training gains, at which settings, and what its schedule saves.

    python benchmarks/ttt.py --checkpoint=FILE --data=FOLDER [--repeats=1] [--only=schedules]
                             [--settings="lora_lr=0.003;lora_lr=0.003,eval_stride=64"] [--out=FILE] [flags]

Schedules: the same model, kernels and documents, in turn, medians over the repeats. "neighbours" is the
field's: --eval_slots documents next to each other in length run in step, as many windows as the longest has,
all in windows as long as the longest's. "neighbours, ended ones dropped" leaves out those that have ended.
Settings: ttt-lora and stride for each, with the gain of one over the other. Other flags go to train_gpt.py.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg


def neighbours(documents: list, slots: int, tokens: int, drop: bool = False):
    """Batches of turns by the field's schedule; `tokens` is not heeded."""
    ordered = sorted(documents, key=len, reverse=True)
    for first in range(0, len(ordered), slots):
        group = ordered[first : first + slots]
        for i, longest in enumerate(group[0]):
            size = longest.hi - longest.lo
            idle = tg.Window(0, size, size)  # any tokens, of which none is scored
            yield [tg.Turn(slot, windows[i] if i < len(windows) else idle, i == 0, i + 1 < len(windows))
                   for slot, windows in enumerate(group) if i < len(windows) or not drop]


SCHEDULES = {
    "continuous": tg.continuous_batches,
    "neighbours": neighbours,
    "neighbours, ended ones dropped": partial(neighbours, drop=True),
}


def timed(function, hardware: tg.Hardware) -> tuple[float, object]:
    hardware.synchronize()
    start = time.perf_counter()
    out = function()
    hardware.synchronize()
    return time.perf_counter() - start, out


def compare_schedules(model: tg.GPT, hardware: tg.Hardware, repeats: int) -> dict:
    """{schedule: seconds of each repeat, batches, tokens run and nats}."""
    cfg, out = model.cfg, {}
    tokens = tg.Validation.load_documents(cfg).tokens.numpy()
    windows = tg.Evaluation(model, tokens, tg.World()).windows(cfg.eval_context, cfg.eval_stride)
    for name, schedule in SCHEDULES.items():
        batches = list(schedule(tg.deal_documents(windows, tg.World()), cfg.eval_slots, cfg.eval_batch))
        run = sum(turn.window.blocks * tg.BLOCK for batch in batches for turn in batch)
        out[name] = {"seconds": [], "batches": len(batches), "tokens": run}
    model.cfg = replace(cfg, eval_batch=max(cfg.eval_batch, cfg.eval_slots * (cfg.eval_context + tg.BLOCK)))
    wide = tg.Evaluation(model, tokens, tg.World())
    model.cfg = wide.cfg = cfg  # the wide one only has rotary tables for what neighbours run at a time
    for name, schedule in SCHEDULES.items():
        synthetic(wide).ttt_lora(schedule)
    for _ in range(repeats):
        for name, schedule in SCHEDULES.items():
            seconds, nats = timed(partial(wide.ttt_lora, schedule), hardware)
            out[name]["seconds"].append(seconds)
            out[name]["nats"] = nats.sum()
    return out


def synthetic(evaluation: tg.Evaluation) -> tg.Evaluation:
    """The same over random documents, to compile and allocate what is needed."""
    out = tg.Evaluation(evaluation.model, tg.synthetic_documents(evaluation.cfg).tokens.numpy(), tg.World())
    out.rotary = evaluation.rotary
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
    return [dict(pair.split("=") for pair in point.split(",") if pair) for point in text.split(";")]


def compare_settings(model: tg.GPT, points: list[dict], hardware: tg.Hardware):
    """For each point, once it is known: loss with ttt-lora, its gain over stride, and its seconds."""
    base, strides = model.cfg, {}
    for point in points:
        kinds = tg.flag_kinds()
        cfg = replace(base, **{name: tg.parse_value(name, kinds[name], text) for name, text in point.items()})
        model.cfg = cfg
        val, key = tg.Validation.load_documents(cfg), (cfg.eval_context, cfg.eval_stride)
        if key not in strides:
            strides[key] = tg.measure("stride", model, val, hardware, tg.World())[0]["loss"]
        row, _ = tg.measure("ttt-lora", model, val, hardware, tg.World())
        yield {"point": point, "loss": row["loss"], "gain": strides[key] - row["loss"],
               "seconds": row["seconds"]}
    model.cfg = base


def setting_line(row: dict) -> str:
    setting = " ".join(f"{name}={value}" for name, value in row["point"].items()) or "defaults"
    return f"| {setting} | {row['loss']:.4f} | {row['gain']:+.4f} | {row['seconds']:.1f} |"


def save(results: dict, path: Path | None):
    if path:
        path.write_text(json.dumps(results, indent=1))


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("schedules", "settings"))
    parser.add_argument("--settings", default="lora_lr=0.0003;lora_lr=0.001;lora_lr=0.003")
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    try:
        cfg = tg.parse_config([*flags, "--eval=ttt-lora"])
        hardware = tg.choose_hardware(cfg, tg.World())
        model = tg.load_model(cfg.checkpoint, cfg, hardware)
        results = {"device": hardware.reasons["device"], "torch": tg.torch.__version__}
        if args.only != "settings":
            results["schedules"] = compare_schedules(model, hardware, args.repeats)
            print(schedule_table(results["schedules"]), flush=True)
            save(results, args.out)
        if args.only != "schedules":
            results["settings"] = []
            print("| setting | loss | gain over stride | seconds |\n|---|--:|--:|--:|", flush=True)
            for row in compare_settings(model, parse_settings(args.settings), hardware):
                results["settings"].append(row)
                print(setting_line(row), flush=True)
                save(results, args.out)
    except tg.UserError as error:
        sys.exit(f"ttt.py: {error}")


if __name__ == "__main__":
    main()
