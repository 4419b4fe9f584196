"""Convert files of the published sizes and measure time and memory.

    python benchmarks/conversion.py --folder /some/disk --out docs/conversion.json

Makes a DiT-XL/2 state dict (2.7 GB) and a DyDiT-XL/2 training file with model, EMA and moments (10.9 GB) of random
numbers, converts each in a process of its own, and watches it: peak resident memory, and peak anonymous memory,
which leaves out pages of files that the system may drop. Needs PyTorch, to write the files, and 20 GB of disk.
"""

import argparse
import collections
import json
import platform
import subprocess
import sys
import time

from absl import flags
from etils import epath

from dydit_jax.convert.tables import source_shapes
from dydit_jax.models.config import published_config
from dydit_jax.models.layers import position_table
from dydit_jax.runtime.console import run

FOLDER = flags.DEFINE_string("folder", None, "Where the files are made; removed afterwards.", required=True)
OUT = flags.DEFINE_string("out", "docs/conversion.json", "File for the results.")


def random_state(config) -> dict:
    """Make a state dict of random numbers in the original's names."""
    import torch

    state = collections.OrderedDict(pos_embed=torch.from_numpy(position_table(config.side // 2, config.width)[None]))
    for name, shape in source_shapes(config).items():
        state[name] = torch.rand(shape) / 30
    return state


def write_sources(folder: epath.Path) -> dict:
    """Write both files; returns their paths by name."""
    import torch

    plain, training = folder / "dit_xl2.pt", folder / "dydit_xl2_training.pt"
    torch.save(random_state(published_config("XL/2", side=32)), plain)
    config = published_config("XL/2", side=32, routers="first_on")
    state = random_state(config)
    moments = {
        i: {"exp_avg": torch.rand(t.shape), "exp_avg_sq": torch.rand(t.shape)} for i, t in enumerate(state.values())
    }
    content = dict(model=state, ema={name: tensor.clone() for name, tensor in state.items()})
    content |= dict(opt=dict(state=moments, param_groups=[{"lr": 1e-4}]), args=argparse.Namespace(model="DiT-XL/2"))
    torch.save(content, training)
    return {"DiT-XL/2 state dict": plain, "DyDiT-XL/2 training file, EMA taken": training}


def memory(pid: int) -> tuple[float, float]:
    """Return resident and anonymous memory of a process in GiB, zeros once it is gone."""
    try:
        lines = epath.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return tuple(int(values.get(name, 0)) / 2**20 for name in ("VmRSS", "RssAnon"))


def watch(command: list[str]) -> dict:
    """Run a command and return its seconds and peaks."""
    began, peaks = time.monotonic(), (0.0, 0.0)
    process = subprocess.Popen(command)
    while process.poll() is None:
        peaks = tuple(map(max, peaks, memory(process.pid)))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return dict(
        seconds=round(time.monotonic() - began, 1),
        peak_resident_gib=round(peaks[0], 2),
        peak_anonymous_gib=round(peaks[1], 2),
    )


def main():
    folder = epath.Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for name, source in write_sources(folder).items():
        target = folder / "converted.safetensors"
        size = round(source.stat().length / 1e9, 2)
        command = [sys.executable, "convert_torch_weights.py", f"--source={source}", f"--out={target}", "--overwrite"]
        results.append(dict(file=name, gigabytes=size, **watch(command)))
        sys.stdout.write(f"{results[-1]}\n")
        source.unlink()
    target.unlink()
    machine = f"{platform.machine()}, {platform.system()}"
    command = "python benchmarks/conversion.py --folder <folder>"  # the folder's name is nobody's business
    report = dict(command=command, machine=machine, date=time.strftime("%Y-%m-%d"), results=results)
    epath.Path(OUT.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
