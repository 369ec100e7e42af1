"""Is an edit faster? Time the steps of several train_gpt.py in turn, on one GPU, in one run.

    python benchmarks/versions.py OLD.py NEW.py .. [--rounds=5] [--steps=8] [--out=FILE] [flags]

Each script gets a process of its own, which keeps its model and graphs in memory (a run of race300 peaks
at 21,246 MiB) and waits while another is timed. A round times every stage of every script once, in an order
that is reversed from round to round, so that what drifts, drifts for all. Prints, for each stage, the median
over rounds of the milliseconds per micro-batch, optimizer included, and the median over rounds of their ratio
to the first script's, with its range. Other flags go to the scripts (--track=race300 is the default). Tokens
are synthetic, as in step.py. Where a script has a benchmarks/step.py beside it, that one times it: a checkout
of another month can be compared, whose functions have other names.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import user_path


def serve(script: str, flags: list):
    """Build the script's model, then time stage after stage as standard input names them."""
    sys.path.insert(0, str(Path(script).resolve().parent / "benchmarks"))
    spec = importlib.util.spec_from_file_location("train_gpt", script)
    tg = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tg)
    from step import Bench

    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        bench = Bench(tg.parse_config(flags))
    except tg.UserError as error:
        sys.exit(f"{script}: {error}")
    print(json.dumps(len(bench.plans)), file=answers, flush=True)
    for line in sys.stdin:
        stage, steps = json.loads(line)
        print(json.dumps(bench.time(bench.plans[stage], steps)), file=answers, flush=True)


class Version:
    """A script's process."""

    def __init__(self, script: str, flags: list):
        self.script = script
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", script, *flags], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.script} ended with status {self.process.wait()}; see above")
        return json.loads(line)

    def time(self, stage: int, steps: int) -> dict:
        print(json.dumps([stage, steps]), file=self.process.stdin, flush=True)
        return self.answer()


def table(results: dict) -> str:
    """Markdown, from {script: rounds of stages}."""
    rows = ["| script | tokens a micro-batch | ms | of the first | range | MiB allocated |",
            "|---|--:|--:|--:|--:|--:|"]
    first = next(iter(results.values()))
    for stage, base in enumerate(zip(*first)):
        for script, rounds in results.items():
            times = [r[stage]["ms"] for r in rounds]
            ratios = [ms / b["ms"] for ms, b in zip(times, base)]
            last = rounds[-1][stage]
            rows.append(f"| {script} | {last['tokens']:,} | {statistics.median(times):.2f} "
                        f"| {statistics.median(ratios):.4f} | {min(ratios):.4f} - {max(ratios):.4f} "
                        f"| {last['peak_mib']:,} |")
    return "\n".join(rows)


def main():
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], sys.argv[3:])
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("scripts", nargs="+", type=user_path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=user_path)
    args, flags = parser.parse_known_args()
    flags = ["--track=race300", *flags]  # later ones win
    if args.steps < 2 or args.steps % 2 or args.rounds < 1:
        parser.error(f"--steps={args.steps} --rounds={args.rounds}: an even number, as Adam works at every "
                     "other step, and one or more")
    missing = [script for script in args.scripts if not script.is_file()]
    if missing or len(set(args.scripts)) < len(args.scripts):
        parser.error(f"{missing[0]} is no file" if missing else "a script is named twice: give a copy")
    versions = [Version(str(script), flags) for script in args.scripts]
    stages = {version.answer() for version in versions}
    if len(stages) > 1:
        sys.exit(f"the scripts have different numbers of stages: {sorted(stages)}")
    results = {version.script: [] for version in versions}
    for number in range(args.rounds):
        for rounds in results.values():
            rounds.append([])
        for stage in range(*stages):
            for version in versions[:: -1 if number % 2 else 1]:
                results[version.script][-1].append(version.time(stage, args.steps))
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
