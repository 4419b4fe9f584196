"""One self-contained page about a folder: what made it, what it cost, how good it is, and its pictures.

A page is made of what lies in the folder, so that `sample.py`, `evaluate.py` and `analyze.py` add to the same one:

    manifest.json     what made the images                     cost.json     what a pass costs
    evaluation.json   metrics                                  *.png         pictures, also of sub-folders
    images/           the first images, where there is no grid
"""

import base64
import html
import io
import json
import time

import numpy as np
from etils import epath

from dydit_jax.drawing.pictures import draw_grid, read_image
from dydit_jax.runtime.files import read_json, write_atomically

REPORT_FILE = "report.html"
MANIFEST_FILE = "manifest.json"
COST_FILE = "cost.json"
EVALUATION_FILE = "evaluation.json"
IMAGES_SHOWN = 24

# Pictures with a known meaning, in the order of the page: heading and what to see.
PICTURES = {
    "grid": ("Images", "One column per label."),
    "losses": ("Loss over timesteps", "Where lines meet, the timestep is easy: a smaller model does as well there."),
    "loss_maps": (
        "Loss over patches",
        "Bright patches are hard. Each map is divided by its mean, which stands below it.",
    ),
    "macs": ("Cost over timesteps", "Multiply-adds of one image's forward pass."),
    "routing": ("What was on", "Heads, MLP groups and tokens over the timesteps, layer by layer; black is on."),
    "tokens": ("Tokens over the image", "White tokens skipped the MLPs; below each picture the share that did not."),
    "tokens_by_layer": ("Tokens over the first image, by layer", "The same for single layers."),
    "plan": (
        "Plan of the fast path",
        "Grey is kept by a segment although it is off; white is left out of its program.",
    ),
}
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; } th { font-weight: 600; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; }
"""


def write_report(folder) -> epath.Path:
    """Write `report.html` about a folder, from what lies in it.

    Args:
      folder: of a job of `sample.py` or `analyze.py`.

    Returns:
      The page's path.
    """
    folder = epath.Path(folder)
    manifest, cost = (_read(folder / name, dict) for name in (MANIFEST_FILE, COST_FILE))
    evaluations = _read(folder / EVALUATION_FILE, list)
    parts = [_facts(manifest or {}), _cost(cost), _metrics(evaluations or [])]
    pictures = _pictures(folder)
    if "grid.png" not in {path.name for path in pictures} and (folder / "images").is_dir():
        parts.append(_section("Images", _figure(_first_images(folder / "images"), "The first images of the set.")))
    for path in pictures:
        heading, told = PICTURES.get(path.stem, (path.stem, ""))
        owner = "" if path.parent == folder else f": {path.parent.name}"
        parts.append(_section(heading + owner, _figure(path.read_bytes(), told)))
    for name, content in ((MANIFEST_FILE, manifest), (EVALUATION_FILE, evaluations)):
        if content:
            text = html.escape(json.dumps(content, indent=2))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    title = html.escape(f"dydit-jax: {folder.name}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>'
        f"<p>Written {time.strftime('%Y-%m-%d %H:%M')}.</p>{''.join(parts)}</body></html>\n"
    )
    path = folder / REPORT_FILE
    with write_atomically(path) as partial:
        partial.write_text(page)
    return path


def _read(path, kind: type):
    return read_json(path, kind=kind) if path.is_file() else None


def _pictures(folder) -> list:
    """Return the pictures of a folder and its sub-folders in the order of the page."""
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "images")]
    order = list(PICTURES)
    rank = lambda path: order.index(path.stem) if path.stem in order else len(order)
    return [path for place in folders for path in sorted(place.glob("*.png"), key=lambda path: (rank(path), path.name))]


def _first_images(folder) -> bytes:
    paths = sorted(folder.glob("*.png"))[:IMAGES_SHOWN]
    file = io.BytesIO()
    draw_grid(np.stack([read_image(path) for path in paths]), columns=8).save(file, format="PNG")
    return file.getvalue()


def _section(heading: str, content: str) -> str:
    return f"<h2>{html.escape(heading)}</h2>{content}"


def _figure(png: bytes, caption: str) -> str:
    source = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(rows: list[tuple]) -> str:
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _facts(manifest: dict) -> str:
    """Return what made the images, the most asked for first."""
    if "sampling" not in manifest:
        return ""
    sampling, model = manifest["sampling"], manifest["model"]
    rows = [
        ("checkpoint", manifest["checkpoint"]),
        ("weights' SHA-256", manifest["checksum"]),
        ("model", f"{model['depth']} blocks, width {model['width']}, {model['heads']} heads, patch {model['patch']}"),
        ("images", manifest["num_images"]),
        ("sampler", f"{sampling['sampler']}, {sampling['steps']} steps"),
        ("guidance", f"{sampling['guidance']}, channels: {sampling['guided_channels']}"),
        ("seed", manifest["seed"]),
        ("mode", manifest["mode"]),
        ("precision", f"{manifest['precision']}, matrix products: {manifest['matmul_precision']}"),
        ("device", manifest["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
    ]
    return _section("What made it", _table(rows))


def _cost(cost: dict | None) -> str:
    if not cost:
        return ""
    rows = [
        ("complete, G MACs per image and pass", f"{cost['macs_complete'] / 1e9:.4f}"),
        (
            "here, G MACs per image and pass",
            f"{cost['macs'] / 1e9:.4f} ({100 * cost['macs'] / cost['macs_complete']:.1f} %)",
        ),
        *((f"{name} on", f"{100 * cost[name]:.1f} %") for name in ("heads", "groups", "tokens")),
        ("images drawn, in seconds", f"{cost['images']} in {cost['seconds']:.1f}, compilation included"),
    ]
    return _section("Cost", _table(rows))


def _metrics(evaluations: list[dict]) -> str:
    if not evaluations:
        return ""
    names = [name for name in METRICS if name in evaluations[0]]
    rows = [("samples", *names, "images", "reference")]
    for found in evaluations:
        values = ["none" if found[name] is None else f"{found[name]:.4f}" for name in names]
        reference = found["reference"] or {}
        rows.append((found["samples"]["name"], *values, found["samples"]["count"], reference.get("name", "none")))
    return _section("Metrics", _table(rows))
