"""The lists of data sets in a configuration of Axolotl."""

from __future__ import annotations

from typing import Any

from mlx_distributed.cli.import_config.rules import (
    Fate,
    Place,
    Rule,
    each,
    mapped,
    missing,
    names,
    refuse,
    text,
    to,
    unneeded,
)
from mlx_distributed.config.checks import OUR_ROLES

PREFERENCES = refuse("trains on preferences or rewards, not on answers")

# How a prompt is built: our format, and what else is to be set for it.
TYPES: dict[str, dict[str, Any]] = {
    "alpaca": {"*.format": "alpaca", "data.alpaca_style": "classic"},
    "alpaca_chat.load_qa": {"*.format": "alpaca", "*.columns": {"instruction": "question", "output": "answer"}},
    "alpaca_w_system.load_open_orca": {
        "*.format": "alpaca",
        "*.columns": {"system": "system_prompt", "instruction": "question", "output": "response"},
    },
    "gpteacher": {"*.format": "alpaca", "data.alpaca_style": "classic", "*.columns": {"output": "response"}},
    "chat_template": {"*.format": "messages"},
    "chat_template.default": {"*.format": "messages"},
    "sharegpt": {"*.format": "messages", "*.columns": {"messages": "conversations"}},
    "completion": {"*.format": "text"},
    "pretrain": {"*.format": "text"},
}


def _trained(value: Any, place: Place) -> Fate:
    roles = {*names(value)}
    if roles <= {"assistant", "gpt", "model"}:
        return mapped({"data.train_on": "assistant"})
    if roles & {"user", "human"}:
        return mapped({"data.train_on": "all"}, "every token, also that of system texts")
    return Fate("no counterpart", "data.train_on takes the turns of the assistant, or all")


def sources(split: str) -> dict[str, Rule]:
    """Rules for the entries of `datasets`, or of another list of data sets."""
    entry = f"data.{split}.*"

    def kind(value: Any, place: Place) -> Fate:
        known = TYPES.get(text(value).partition(":")[0])
        if known is None:
            ours = {place.fill(f"{entry}.format"): "auto"}
            return Fate("no counterpart", "prompts of this type are not built here; the columns decide", ours)
        ours = {place.fill(key.replace("*", entry, 1)): each for key, each in known.items()}
        if value == "alpaca:chat":
            return Fate("no counterpart", "the prompt of Alpaca takes the place of its chat", ours)
        words = "there a line break follows Response: in the prompt" if "data.alpaca_style" in ours else ""
        return mapped(ours, words)

    def column(ours: str) -> Rule:
        target = f"{entry}.columns"
        return Rule(lambda value, place: mapped({place.fill(target): {ours: text(value)}}), (target,))

    def turns(value: Any, place: Place) -> Fate:
        return mapped({place.fill(f"{entry}.columns"): {"messages": text(value)}})

    def roles(value: Any, place: Place) -> Fate:
        if place.name not in OUR_ROLES:
            return Fate("no counterpart", f"is not a role of ours, which are {', '.join(OUR_ROLES)}")
        return mapped({place.fill(f"{entry}.roles"): dict.fromkeys(names(value), place.name)})

    def path(value: Any, place: Place) -> Fate:
        if value in ("json", "parquet"):
            return Fate("not needed", "data_files says it")
        return mapped({place.fill(f"{entry}.path"): place.theirs.path(text(value))})

    def files(value: Any, place: Place) -> Fate:
        found = place.theirs.find(names(value)[0]) if len(names(value)) == 1 else None
        if found is not None:
            return mapped({place.fill(f"{entry}.path"): found})
        return Fate("no counterpart", "of a data set on the hub all files are read; or give the path of a file")

    types = (f"{entry}.format", f"{entry}.columns", "data.alpaca_style")
    columns = Rule(turns, (f"{entry}.columns",))
    return {
        "path": Rule(path, (f"{entry}.path",)),
        "data_files": Rule(files, (f"{entry}.path",)),
        "type": Rule(kind, types),
        "split": to(f"{entry}.split", text),
        "name": to(f"{entry}.subset", text),
        "field": column("text"),
        "text_column": column("text"),
        "field_messages": columns,
        "field_tools": column("tools"),
        "message_property_mappings.role": column("role"),
        "message_property_mappings.content": column("content"),
        "message_field_role": column("role"),
        "message_field_content": column("content"),
        "type.field_instruction": column("instruction"),
        "type.field_input": column("input"),
        "type.field_output": column("output"),
        "type.field_system": column("system"),
        **each(
            "type.format type.no_input_format type.system_prompt type.system_format",
            missing("data.chat_template says how a prompt is written"),
        ),
        "roles": Rule(roles, (f"{entry}.roles",), covers=True),
        "roles_to_train": Rule(_trained, ("data.train_on",)),
        "train_on_eos": to("data.train_on_eos", lambda value: value not in ("none", False)),
        "train_on_eot": to("data.train_on_eos", lambda value: value not in ("none", False)),
        "ds_type": unneeded("the name of a file says it"),
        "chat_template": missing("one template serves all data: data.chat_template"),
        "conversation": missing("one template serves all data: data.chat_template"),
        "drop_system_message": missing("system texts are kept"),
        **each("field_chosen field_rejected step_separator max_completion_length train_on_last_step_only", PREFERENCES),
        **each(
            "field_thinking template_thinking_key split_thinking",
            missing("thoughts are trained on only where they stand in the answer"),
        ),
        **each(
            "message_field_training message_field_training_detail",
            missing("a turn cannot say itself whether it is trained on"),
        ),
        **each(
            "shards shards_idx preprocess_shards skip revision trust_remote_code",
            missing("a data set is read whole, and its newest version"),
        ),
    }
