"""One self-contained page about a folder: its pictures, what made them, what it cost, and how good it is.

A page is made of what lies in the folder, so that `sample.py`, `evaluate.py` and `analyze.py` add to the same one:

    manifest.json     what made the images                     cost.json     what a pass and the job cost
    analysis.json     what `analyze.py` was asked for          <figure>.png  see `PICTURES`, also of sub-folders
    evaluation.json   metrics                                  images/       the first images, without a grid

The images may also lie in the folder itself or its class folders, in any size and format that is read.

It is read on phones too, by day and by night: no word is broken, what is too wide scrolls in its own box, and the
figures' paper is dark where the page is.
"""

import base64
import html
import io
import json
import logging
import re
import time

import numpy as np
from etils import epath

from dydit_jax.data.folders import is_picture
from dydit_jax.data.images import center_crop, decode_image, read_picture
from dydit_jax.drawing.pictures import draw_grid
from dydit_jax.errors import InputError
from dydit_jax.models.cost import format_count
from dydit_jax.runtime.files import locate, read_json, write_atomically

REPORT_FILE = "report.html"
MANIFEST_FILE = "manifest.json"
COST_FILE = "cost.json"
ANALYSIS_FILE = "analysis.json"
EVALUATION_FILE = "evaluation.json"
IMAGES_SHOWN, IMAGE_SIDE = 24, 256  # of a set without a grid: so many, cropped to at most so many pixels

logger = logging.getLogger(__name__)

# Pictures with a known meaning, in the order of the page: heading and what to see.
PICTURES = {
    "grid": ("Images", "The label stands above its images."),
    "losses": ("Loss over timesteps", "Where lines meet, the timestep is easy: a smaller model does as well there."),
    "loss_maps": (
        "Loss over patches",
        "Strongly coloured patches are hard. Each map is divided by its mean, which stands below it.",
    ),
    "macs": ("Cost over timesteps", "Multiply-adds of one image's forward pass."),
    "steps": (
        "Steps",
        "One point for each evaluation of the network. A band, shaded or white, is a segment: one compiled program.",
    ),
    "routing": (
        "Open gates",
        "Heads, MLP groups and tokens over the timesteps, by layer, and what a pass costs.",
    ),
    "tokens": ("Tokens over the image", "Tinted tokens skip the MLPs; below each picture the share that does not."),
    "tokens_by_layer": ("Tokens over the first image, by layer", "The same for single layers."),
    "growth": (
        "Images as they grow",
        "What the network takes the first images for, step by step. Tinted tokens skip MLPs. Moving: growth.gif.",
    ),
    "plan": (
        "Plan of the fast path",
        "Lines cut segments. A segment computes what any of its steps needs, and leaves the rest out of its program.",
    ),
}
# These hold images, whose colours stay as they are at night.
PHOTOGRAPHS = ("grid", "tokens", "tokens_by_layer", "growth", "images")
METRICS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
}
CHECKSUM_DIGITS = 16
STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #5b6672; --paper: #fff; --box: #f2f4f6; --line: #d3dae1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --faint: #a3adb8; --paper: #14171a; --box: #1f2429; --line: #38424c; }
  img { filter: invert(.92) hue-rotate(180deg); } img.photograph { filter: brightness(.88); }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 44rem;
  margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h1, .lead, dd, pre, .scroll { overflow-x: auto; } .lead { color: var(--faint); margin: 0; }
figure { margin: 0; } img { display: block; width: 36rem; max-width: 100%; border-radius: 4px; }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .5rem; }
dl { margin: 0; display: grid; grid-template-columns: 10rem minmax(0, 1fr); border-top: 1px solid var(--line); }
dt, dd { margin: 0; padding: .35rem 0; border-bottom: 1px solid var(--line); } dt { color: var(--faint); }
dd, td { font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; } td, th { padding: .3rem 1.2rem .3rem 0; text-align: left; white-space: nowrap; }
tr { border-bottom: 1px solid var(--line); } th { font-weight: 600; }
pre { background: var(--box); border-radius: 4px; padding: .7rem; margin: .6rem 0; font-size: .8rem; line-height: 1.4; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--faint); }
@media (max-width: 30rem) { dl { display: block; } dt { border: 0; padding-bottom: 0; } dd { padding-top: 0; } }
"""


def write_report(folder) -> epath.Path:
    """Write `report.html` about a folder, from what lies in it.

    Args:
      folder: of a job of `sample.py` or `analyze.py`.

    Returns:
      The page's path.
    """
    folder = locate(folder)
    manifest, cost, analysis = (_read(folder / name, dict) for name in (MANIFEST_FILE, COST_FILE, ANALYSIS_FILE))
    evaluations = _read(folder / EVALUATION_FILE, list)
    parts = [*_picture_sections(folder), _origin(manifest, cost, analysis), _cost(cost), _metrics(evaluations or [])]
    contents = ((MANIFEST_FILE, manifest), (ANALYSIS_FILE, analysis), (EVALUATION_FILE, evaluations))
    for name, content in contents:
        if content:
            shown = content if name != MANIFEST_FILE else {key: content[key] for key in content if key != "steps"}
            text = html.escape(json.dumps(shown, indent=2))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    title = f"dydit-jax: {folder.name}"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{_breakable(title)}</h1>"
        f'<p class="lead">{_breakable(_lead(manifest, cost))}</p>{"".join(parts)}</body></html>\n'
    )
    path = folder / REPORT_FILE
    with write_atomically(path) as partial:
        partial.write_text(page)
    return path


def _read(path, kind: type):
    return read_json(path, kind=kind) if path.is_file() else None


# --- Pieces of a page ----------------------------------------------------------------------------


def _breakable(text) -> str:
    """Escape a text, with leave to break its lines where a path or name has a sign, and nowhere within a word."""
    return re.sub(r"([/_=,])(?=\w)", r"\1<wbr>", html.escape(str(text)))


def _section(heading: str, content: str) -> str:
    return f"<h2>{_breakable(heading)}</h2>{content}"


def _figure(png: bytes, caption: str, name: str) -> str:
    source, kind = base64.b64encode(png).decode(), ' class="photograph"' if name in PHOTOGRAPHS else ""
    return (
        f'<figure><img{kind} alt="{html.escape(caption)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _facts(rows: list[tuple]) -> str:
    """Return names and values; on a phone a value stands below its name. Those that are None are left out."""
    known = [(name, value) for name, value in rows if value not in (None, "")]
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{_breakable(value)}</dd>' for name, value in known)}</dl>"


def _table(rows: list[list]) -> str:
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _command(text: str) -> str:
    """Return a command as it can be typed again, a flag to a line."""
    lines = text.replace(" --", " \\\n  --")
    return f"<pre>{html.escape(lines)}</pre>"


# --- Sections ------------------------------------------------------------------------------------


def _lead(manifest: dict | None, cost: dict | None) -> str:
    """Return the page in one sentence."""
    parts = []
    if manifest and "sampling" in manifest:
        sampling = manifest["sampling"]
        parts.append(f"{manifest['num_images']} images, {sampling['sampler']} with {sampling['steps']} steps")
    if cost:
        share = 100 * cost["macs"] / cost["macs_complete"]
        parts.append(f"{format_count(cost['macs'])} MACs per image and pass, {share:.0f} % of the complete model's")
    return "; ".join([*parts, f"written {time.strftime('%Y-%m-%d %H:%M')}."])


def _picture_sections(folder) -> list[str]:
    """Return the pictures of a folder and its sub-folders in the order of the page."""
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "images")]
    paths = [owner / f"{name}.png" for owner in folders for name in PICTURES]
    paths = [path for path in paths if path.is_file()]
    sections = _image_sections(folder, paths)
    for path in paths:
        heading, caption = PICTURES[path.stem]
        owner = "" if path.parent == folder else f": {path.parent.name}"
        sections.append(_section(heading + owner, _figure(path.read_bytes(), caption, path.stem)))
    return sections


def _image_sections(folder, figures: list) -> list[str]:
    """Return the first images of a set that no grid shows; the set lies in `images`, or is a folder without figures."""
    images = folder / "images" if (folder / "images").is_dir() else folder
    if folder / "grid.png" in figures or (figures and images == folder):
        return []
    first = _first_images(images)
    return [_section("Images", _figure(first, "The first images of the set.", "images"))] if first else []


def _first_images(folder) -> bytes | None:
    """Return the first images of a folder, or of its class folders, as one PNG; None without any that can be read."""
    paths = sorted([*folder.glob("*"), *folder.glob("*/*")])
    paths = [path for path in paths if is_picture(path.relative_to(folder).as_posix())][:IMAGES_SHOWN]
    try:
        images = [decode_image(read_picture(path), str(path)) for path in paths]
    except InputError as error:
        logger.warning("%s The report goes without images.", error)
        return None
    if not images:
        return None
    side = min(IMAGE_SIDE, *(min(image.size) for image in images))
    file = io.BytesIO()
    draw_grid(np.stack([center_crop(image, side) for image in images]), columns=8).save(file, format="PNG")
    return file.getvalue()


def _origin(manifest: dict | None, cost: dict | None, analysis: dict | None) -> str:
    """Return what made the pictures: the command, and then the settings, the most asked for first."""
    made = (cost or {}).get("made") or (analysis or {}).get("made") or {}
    rows = []
    if manifest and "sampling" in manifest:
        rows = _sample_facts(manifest)
    elif analysis:
        rows = [
            ("checkpoints", ", ".join(analysis["checkpoints"])),
            ("data", analysis["data"] or "what the first model was trained on"),
            ("examples", f"{analysis['num_examples']}, at {analysis['num_timesteps']} timesteps"),
            ("seed", analysis["seed"]),
            ("precision", analysis["precision"]),
        ]
    versions = made.get("versions") or (manifest or {}).get("versions") or {}
    rows += [
        ("device", made.get("device") or (manifest or {}).get("device")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("date", made.get("date")),
    ]
    if not any(value for _, value in rows):
        return ""
    command = _command(made["command"]) if made.get("command") else ""
    return _section("What made it", command + _facts(rows))


def _sample_facts(manifest: dict) -> list[tuple]:
    sampling, model = manifest["sampling"], manifest["model"]
    return [
        ("checkpoint", manifest["checkpoint"]),
        ("weights' SHA-256", f"{manifest['checksum'][:CHECKSUM_DIGITS]}…"),
        ("model", f"{model['depth']} blocks, width {model['width']}, {model['heads']} heads, patch {model['patch']}"),
        ("images", manifest["num_images"]),
        ("sampler", f"{sampling['sampler']}, {sampling['steps']} steps"),
        ("guidance", f"{_guidance(sampling)}, channels: {sampling['guided_channels']}"),
        ("seed", manifest["seed"]),
        ("mode", manifest["mode"]),
        ("precision", f"{manifest['precision']}, matrix products: {manifest['matmul_precision']}"),
    ]


def _guidance(sampling: dict) -> str:
    """Return the scale of guidance, and where it applies."""
    if sampling.get("guidance_scales"):
        return "a scale per evaluation: " + ", ".join(map(str, sampling["guidance_scales"]))
    low, high = sampling.get("guidance_interval") or (None, None)
    return f"{sampling['guidance']}" + ("" if low is None else f" at timesteps {low:g} to {high:g}")


def _cost(cost: dict | None) -> str:
    if not cost:
        return ""
    share = lambda name: f"{format_count(cost[name])} ({100 * cost[name] / cost['macs_complete']:.1f} %)"
    rows = [
        ("every gate open", f"{format_count(cost['macs_complete'])} MACs per image and pass"),
        ("needed", share("macs")),
        ("executed", share("macs_executed") if "macs_executed" in cost else None),
        *((f"open {name}", f"{100 * cost[name]:.1f} %") for name in ("heads", "groups", "tokens")),
        ("images drawn", cost["images"]),
        ("time", f"{cost['seconds']:.1f} s, {cost.get('compile_seconds', 0):.1f} s of it compiling"),
    ]
    return _section("Cost", _facts(rows))


def _metrics(evaluations: list[dict]) -> str:
    """Return the metrics, a column for each set of images."""
    if not evaluations:
        return ""
    score = lambda found, name: "none" if found[name] is None else f"{found[name]:.4f}"
    rows = [["samples", *(found["samples"]["name"] for found in evaluations)]]
    rows += [
        [title, *(score(found, name) for found in evaluations)]
        for name, title in METRICS.items()
        if name in evaluations[0]
    ]
    rows.append(["images", *(found["samples"]["count"] for found in evaluations)])
    rows.append(["reference", *((found["reference"] or {}).get("name", "none") for found in evaluations)])
    return _section("Metrics", _table(rows))
