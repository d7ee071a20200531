"""The model card: README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlx_distributed import __version__
from mlx_distributed.cli.export.facts import Facts, is_hub_name, public_name
from mlx_distributed.config import ModelConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models.load import locate

TAG = "mlx-distributed"
"""By which a folder is known that may be exported to again."""
_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&$])")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_MAX_CARD_BYTES = 1 << 20


def render_card(name: str, below: ModelConfig | None, facts: Facts | None, changes: list[str], *, adapter: bool) -> str:
    """The text of a model card.

    Args:
        name: of the model, on the Hub or of its folder.
        below: what was trained; None where it is not known.
        facts: of the run, if it is known.
        changes: what the export did to the weights, a sentence each.
        adapter: there are adapters alone, and the model that they are for has to be had besides.
    """
    base = None if below is None else below.path
    model = ["--model", name]
    if adapter and base is not None:
        model = ["--model", public_name(base), "--adapter-path", name]
    lines = ["---", yaml.safe_dump(_metadata(below, facts), sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {_text(name)}", "", _trained(below, facts), *changes, ""]
    command = shlex.join(["mlx_lm.generate", *model, "--prompt", "Hello"])
    lines += ["## How to use it", "", *_fenced(f"pip install mlx-lm\n{command}", "bash"), ""]
    if facts is not None:
        lines += _section("Figures", facts.figures)
        lines += _section("Data", facts.data)
        versions = [f"{name} {version}" for name, version in facts.versions.items()]
        lines += _section("Versions", [", ".join(versions), f"exported by mlx-distributed {__version__}"])
        lines += _details(facts.config)
    return "\n".join(lines)


def is_export(folder: Path) -> bool:
    """Whether a folder holds what was exported, and nothing else that would be lost with it."""
    try:
        metadata = _front_matter(folder / "README.md")
        return TAG in metadata.get("tags", ()) and not any(path.is_dir() for path in folder.iterdir())
    except (OSError, TypeError):
        return False


def _metadata(below: ModelConfig | None, facts: Facts | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx", TAG]}
    if below is not None and below.path is not None:
        if is_hub_name(below.path):
            metadata["base_model"] = below.path
        if (license := _license(below)) is not None:
            metadata["license"] = license
    if facts is not None and (datasets := sorted(set(_datasets(facts.config)))):
        metadata["datasets"] = datasets
    return metadata


def _license(below: ModelConfig) -> str | None:
    """What the card of that model says, where it lies on this machine."""
    try:
        license = _front_matter(locate(below, local_files_only=True) / "README.md").get("license")
    except (OSError, ConfigError):
        return None
    return license if isinstance(license, str) and _LICENSE.fullmatch(license) else None


def _front_matter(card: Path) -> Mapping[str, Any]:
    with card.open("rb") as file:
        text = file.read(_MAX_CARD_BYTES).decode("utf-8", "replace")
    match = re.match(r"---\r?\n(.*?\n)---\s", text, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except (ValueError, yaml.YAMLError):
        found = None
    return found if isinstance(found, dict) else {}


def _datasets(config: Mapping[str, Any]) -> Iterator[str]:
    """Names on the Hub; a local path is a name without a slash by now."""
    data = config.get("data")
    for key in ("train", "validation"):
        sources = data.get(key) if isinstance(data, Mapping) else None
        for source in sources if isinstance(sources, list) else []:
            path = source.get("path") if isinstance(source, Mapping) else None
            if isinstance(path, str) and is_hub_name(path):
                yield path


def _trained(below: ModelConfig | None, facts: Facts | None) -> str:
    if below is None:
        return "A model, exported by mlx-distributed."
    what, verb = "A new model", "trained"
    if (base := below.path) is not None:
        what, verb = _text(public_name(base)), "fine-tuned"
        if is_hub_name(base):
            what = f"[{what}](https://huggingface.co/{base})"
    kinds = {"lora": " with LoRA", "dora": " with DoRA", "full": ", all of it,"}
    how = None if facts is None else facts.config.get("method")
    return f"{what}, {verb}{kinds.get(str(how), '')} by mlx-distributed."


def _section(title: str, lines: list[str] | tuple[str, ...]) -> list[str]:
    return [f"## {title}", "", *(f"- {_text(line)}" for line in lines), ""] if lines else []


def _details(config: Mapping[str, Any]) -> list[str]:
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    title = "<summary>Configuration, with names in place of local paths</summary>"
    return ["<details>", title, "", *_fenced(text.rstrip(), "yaml"), "", "</details>", ""]


def _fenced(text: str, language: str) -> list[str]:
    """Between fences that are longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text, fence]


def _text(value: str) -> str:
    """Text on one line that Markdown and HTML show as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(value.split()))
