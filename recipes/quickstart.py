"""The whole product on two CPU cores: data, tokenizers, model, LoRA, images, metrics, report.

    python recipes/quickstart.py [--fresh] [--until STEP]

Every step is a command that you can run by yourself. A finished step is not run again, so an interrupted quickstart
continues; ``--fresh`` starts again, and ``--until`` ends it after a step.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs/quickstart")
PYTHON = [sys.executable]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(os.cpu_count())]  # fmt: skip
# One shape each, of which size, colour and background are said. A tenth of all captions is in no training row.
SCENES = [*PYTHON, "recipes/prepare_shapes.py", "--size", "64", "--places", "16", "--tasks", "attributes",
          "--hold-out-captions", "0.1", "--out"]  # fmt: skip
# Two processes of one thread each train nearly twice as fast as one with two threads, whose matrices are too small to share.
PROCESSES = min(2, os.cpu_count() or 1)
TRAIN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES),
         "recipes/train.py"]  # fmt: skip

# Name and command of every step, in order.
STEPS: dict[str, list[str]] = {
    "scenes": [*SCENES, f"{OUT}/data/scenes", "--train", "32000", "--validation", "512"],
    "pastels": [*SCENES, f"{OUT}/data/pastels", "--train", "2000", "--validation", "64", "--style", "pastel"],
    "image_tokenizer": [*LAUNCH, "recipes/train_tokenizer.py", "--config", "recipes/configs/quickstart_tokenizer.yaml"],
    "text_tokenizer": [*PYTHON, "recipes/train_text_tokenizer.py", "--source", f"{OUT}/data/scenes", "--vocab-size", "512",
                       "--out", f"{OUT}/text_tokenizer"],
    "codes": [*PYTHON, "recipes/encode_images.py", "--image-tokenizer", f"{OUT}/image_tokenizer",
              "--source", f"{OUT}/data/scenes", "--out", f"{OUT}/codes"],
    "model": [*TRAIN, f"batch_size={16 // PROCESSES}", "--config", "recipes/configs/quickstart.yaml"],
    "lora": [*TRAIN, f"batch_size={8 // PROCESSES}", "--config", "recipes/configs/quickstart_lora.yaml"],
    "clip": [*PYTHON, "eval/train_clip.py", "--data", f"{OUT}/data/scenes", "--max-samples", "4096", "--steps", "180",
             "--out", f"{OUT}/clip", "--name", "shapes-nano"],
    "evaluate": [*PYTHON, "eval/evaluate.py", "--pipeline", f"{OUT}/model/pipeline", "--data", f"{OUT}/data/scenes",
                 "--split", "validation", "--clip", f"{OUT}/clip", "--num-images", "64",
                 "--guidance-scale", "1.5", "--temperature", "0.9",
                 "--metrics", "fd", "kd", "clip", "shapes", "--out", f"{OUT}/evaluation"],
    "report": [*PYTHON, "recipes/quickstart_report.py", "--run", str(OUT)],
}  # fmt: skip

# What a step leaves behind, and refuses to go on from with other settings, other images or another tokenizer.
LEFT = {
    "codes": ("codes.partial",), "model": ("model/checkpoints",), "lora": ("lora_run/codes", "lora_run/codes.partial"),
}  # fmt: skip


def tree_memory_gb(process: psutil.Process) -> float:
    """Resident memory of a process and its descendants, in GB; 0 once it has gone."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended between listing and reading
    return total / 1e9


def run(command: list[str]) -> tuple[float, float]:
    """Run a command from the repository's root; returns seconds and peak memory in GB. Exits if it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    start, peak = time.monotonic(), 0.0
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "ACCELERATE_USE_CPU": "true"}) as child:
        process, ended = psutil.Process(child.pid), threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.5):
                peak = max(peak, tree_memory_gb(process))

        watcher = threading.Thread(target=watch)
        watcher.start()
        child.wait()
        ended.set()
        watcher.join()
    if child.returncode != 0:
        sys.exit(f"quickstart: this step failed with exit code {child.returncode}; run again to continue from here.")
    return time.monotonic() - start, peak


def settings_of(command: list[str]) -> str:
    """The settings of a step, for comparison with an earlier run: the command, and the text of its config file."""
    configs = [(ROOT / part).read_text() for part in command if part.endswith(".yaml")]
    return "\n".join([shlex.join(command[1:]), *configs])


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet, in order; a changed step makes all later ones run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help=f"remove {OUT} first")
    parser.add_argument("--until", choices=STEPS, help="the last step (default: all of them)")
    args = parser.parse_args(argv)
    out = ROOT / OUT
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    record_file = out / "steps.json"
    before = json.loads(record_file.read_text()) if record_file.is_file() else {}
    records: dict[str, dict[str, Any]] = {}
    stale = False
    for name, command in STEPS.items():
        settings, record = settings_of(command), before.get(name, {})
        same = not stale and record.get("settings") == settings
        if same and record["seconds"] is not None:
            print(f"{name}: done")
            records[name] = record
            if name == args.until:
                return
            continue
        stale = True  # later steps have older inputs
        if not same:
            for folder in LEFT.get(name, ()):
                shutil.rmtree(out / folder, ignore_errors=True)
        interrupted = name == "model" and any((out / "model" / "checkpoints").glob("step-*"))
        records[name] = {"settings": settings, "command": shlex.join(command), "seconds": None, "peak_memory_gb": None}
        record_file.write_text(json.dumps(records, indent=2))
        seconds, memory = run([*command, "resume=latest"] if interrupted else command)
        records[name] |= {"seconds": seconds, "peak_memory_gb": memory}
        record_file.write_text(json.dumps(records, indent=2))
        if name == args.until:
            return
    print(f"\nDone. Open {OUT}/report.html; the images are beside it.")


if __name__ == "__main__":
    from unified.errors import explain_errors  # takes seconds; nothing else here needs torch

    explain_errors(main)
