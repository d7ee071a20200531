"""What a YAML file and overrides become, and what is said about the ones that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_distributed.config import Config, SourceConfig, load_config, to_dict
from mlx_distributed.errors import ConfigError

MINIMAL = "model: {path: org/model}\ndata: {train: org/rows}\n"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is not the folder of the YAML file."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path, *overrides: str) -> list[str]:
    """The lines of the error after its summary."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    summary, *lines = str(error.value).splitlines()
    assert summary == (
        f"The configuration {path} has {'a problem' if len(lines) == 1 else f'{len(lines)} problems'}; "
        "nothing was started."
    )
    return lines


# Files that are no configuration at all.


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "the file is empty; it must be a mapping"),
        ("# only a remark\n", 1, "the file is empty"),
        ("\n- model\n", 2, "the top level is [model]; it must be a mapping of sections such as model"),
        ("just text", 1, "the top level is just text"),
        ("seed: 1\nmodel: [\n", 3, "not valid YAML: while parsing a flow node"),
        ("seed: 1\nmodel: a: b\n", 2, "not valid YAML: mapping values are not allowed here at column 9"),
        ("seed: 1\n---\nseed: 2\n", 2, "but found another document"),
        (b"seed: 1\noutput_dir: \xff\n", 2, "not UTF-8 text; save the file as UTF-8"),
        ("seed: 1\noutput_dir: \a\n", 2, "not valid YAML: special characters are not allowed"),
        ("seed: !!python/name:os.system x\n", 1, "could not determine a constructor for the tag"),
        ("seed: !!int x\n", 1, "invalid literal"),
        ("[a]: 1\n", 1, "found a key that is not text"),
        ("model: &again\n  scratch: *again\n", 1, "refers to itself"),
        ("model:\n  <<: 3\n", 2, "expected a mapping"),
    ],
)
def test_file_that_cannot_be_read(tmp_path: Path, text: str | bytes, line: int, words: str) -> None:
    path = write(tmp_path, text)
    [problem] = refusal(path)
    assert problem.startswith(f"{path}:{line}: ")
    assert words in problem


def test_missing_file_and_folder(tmp_path: Path) -> None:
    missing = Path("missing.yaml")
    [problem] = refusal(missing)
    looked_at = tmp_path / "here" / "missing.yaml"
    assert problem == f"{missing}: No such file or directory (looked at {looked_at}); give the path of a YAML file"
    [problem] = refusal(tmp_path)
    assert problem.startswith(f"{tmp_path}: Is a directory")


# Scalars and types.


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.learning_rate=1e-5", "optimizer.learning_rate", 1e-5),
        ("optimizer.learning_rate=4.8e-3", "optimizer.learning_rate", 4.8e-3),
        ("optimizer.learning_rate=.5", "optimizer.learning_rate", 0.5),
        ("train.epochs=2", "train.epochs", 2.0),
        ("train.max_steps=10", "train.max_steps", 10),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("train.max_grad_norm=", "train.max_grad_norm", None),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing", True),
        ("model.dtype=bfloat16", "model.dtype", "bfloat16"),
        ("wandb.name=no", "wandb.name", "no"),
        ("wandb.name=007", "wandb.name", "007"),
        ("wandb.name=12:30", "wandb.name", "12:30"),
        ("wandb.name=2024-01-01", "wandb.name", "2024-01-01"),
        ('wandb.name="1"', "wandb.name", "1"),
        ("wandb.tags=on", "wandb.tags", ["on"]),
        ("wandb.tags=[a, b]", "wandb.tags", ["a", "b"]),
        ("lora.target_modules=all-linear", "lora.target_modules", "all-linear"),
        ("lora.target_modules=q_proj", "lora.target_modules", ["q_proj"]),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("optimizer.betas=[0, 0.95]", "optimizer.betas", [0.0, 0.95]),
        ("data.train.0.roles={no: user, y: assistant}", "data.train.0.roles", {"no": "user", "y": "assistant"}),
        ("data.train.0.weight=2", "data.train.0.weight", 2.0),
        ("data.train.1=org/more", "data.train.1.path", "org/more"),
        ("data.train.1.path=org/more", "data.train.1.path", "org/more"),
        ("data.validation.0.path=org/more", "data.validation.0.path", "org/more"),
        ("data.validation=org/more", "data.validation.0.path", "org/more"),
        ("data.train={path: org/more, format: text}", "data.train.0.format", "text"),
        (" seed = 5", "seed", 5),
        ("lora={rank: 4}", "lora.rank", 4),
        ("lora=", "lora.rank", 8),
    ],
)
def test_override_becomes_a_value_of_its_type(tmp_path: Path, override: str, key: str, value: object) -> None:
    found: Any = to_dict(load_config(write(tmp_path, MINIMAL), [override]))
    for name in key.split("."):
        found = found[int(name) if name.isdecimal() else name]
    assert found == value
    assert type(found) is type(value)


def test_other_users_of_yaml_keep_its_booleans() -> None:
    assert yaml.safe_load("[no, 1e-5]") == [False, "1e-5"]


def test_file_and_override_meet_in_one_section(tmp_path: Path) -> None:
    path = write(
        tmp_path, "model: {scratch: {model_type: qwen3, rope: {type: a, 2: b}}}\nmethod: full\ndata: {train: a}"
    )
    overrides = [
        "model.scratch.vocab_size=64",
        "model.scratch.rope.type=c",
        "lora.rank=2",
        "lora.alpha=4",
        "lora.rank=3",
    ]
    config = load_config(path, overrides)
    assert config.model.scratch == {"model_type": "qwen3", "rope": {"type": "c", 2: "b"}, "vocab_size": 64}
    assert (config.lora.rank, config.lora.alpha) == (3, 4.0)


def test_override_of_one_list_leaves_the_list_that_shares_its_text(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {path: m}\ndata: {train: &rows [org/rows], validation: *rows}\n")
    config = load_config(path, ["data.train.0.weight=2"])
    assert [source.weight for source in config.data.train + config.data.validation] == [2.0, 1.0]


def test_merge_key_and_empty_section(tmp_path: Path) -> None:
    path = write(
        tmp_path, "model: {path: m}\nlora:\ndata:\n  train:\n  - &a {path: a, weight: 2}\n  - {<<: *a, path: b}\n"
    )
    config = load_config(path)
    assert config.data.train == (SourceConfig(path="a", weight=2.0), SourceConfig(path="b", weight=2.0))
    assert config.lora == Config().lora


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: true", "seed=true: must be a whole number"),
        ("train: {max_steps: 1e3}", "train.max_steps=1e3: must be a whole number or null; write 1000"),
        ("train: {max_steps: '10'}", "train.max_steps=10: must be a whole number or null; write it without quotes"),
        ("train: {epochs: many}", "train.epochs=many: must be a number"),
        ("train: {epochs: [1]}", "train.epochs=[1]: must be a number"),
        ("train: {epochs:}", "train.epochs=null: must be a number; leave the key out for the default"),
        ("train: {gradient_checkpointing: yes}", "train.gradient_checkpointing=yes: must be true or false; write true"),
        ("train: {gradient_checkpointing: 0}", "train.gradient_checkpointing=0: must be true or false; write false"),
        ("wandb: {name: 12}", 'wandb.name=12: must be text or null; write "12" in quotes'),
        ("wandb: {tags: [a, 1]}", 'wandb.tags.1=1: must be text; write "1" in quotes'),
        ("wandb: {tags: {a: b}}", "wandb.tags={a: b}: must be a list of names"),
        (
            "model: {dtype: bf16}",
            "model.dtype=bf16: must be float32, bfloat16, float16 or null; did you mean bfloat16?",
        ),
        ("method: qlora", "method=qlora: must be lora, dora or full; did you mean lora?"),
        ("parallel: {share: [1, x]}", "parallel.share=[1, x]: must be even, speed or a list of numbers"),
        ("parallel: {share: odd}", "parallel.share=odd: must be even, speed or a list of numbers"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas=[0.9]: must be a list of 2 numbers"),
        ("optimizer: {betas: [0.9, x]}", "optimizer.betas.1=x: must be a number"),
        ("optimizer: adamw", "optimizer=adamw: must be a section; its keys are name, learning_rate"),
        ("model: {scratch: qwen3}", "model.scratch=qwen3: must be a mapping or null"),
        ("data: {train: {path: a, roles: bot}}", "data.train.0.roles=bot: must be a mapping of text to text"),
        ("data: {train: {path: a, columns: {1: a}}}", 'data.train.0.columns.1=1: must be text; write "1" in quotes'),
        ("data: {train: }", "data.train=null: must be a list of sources; leave the key out"),
        ("data: {train: [[a]]}", "data.train.0=[a]: must be a section; its keys are path, format"),
        ("data: {train: 5}", 'data.train.0.path=5: must be text; write "5" in quotes'),
        ("output_dir: 5", 'output_dir=5: must be a path; write "5" in quotes'),
        ("output_dir: ''", 'output_dir="": must be a path'),
        (f"wandb: {{name: [{'a' * 100}]}}", "wandb.name=[" + "a" * 76 + "...: must be text"),
    ],
)
def test_value_of_the_wrong_type(tmp_path: Path, text: str, words: str) -> None:
    section = text.partition(":")[0]
    rest = "".join(line + "\n" for line in MINIMAL.splitlines() if not line.startswith(section))
    path = write(tmp_path, f"{rest}{text}\n")
    line = rest.count("\n") + 1
    [problem] = [found for found in refusal(path) if not found.startswith(f"{path}:{line}: model.path: no model")]
    assert problem.startswith(f"{path}:{line}: {words}")


def test_number_with_more_digits_than_a_float_holds(tmp_path: Path) -> None:
    [problem] = refusal(write(tmp_path, MINIMAL), f"train.epochs=1{'0' * 400}")
    assert "train.epochs=1000" in problem
    assert "must be a finite number" in problem


# Keys.


def test_misspelt_key_is_not_also_reported_as_missing(tmp_path: Path) -> None:
    path = write(tmp_path, "base_model: org/model\ndataset: org/rows\n")
    assert [line.removeprefix(f"{path}:") for line in refusal(path)] == [
        "1: base_model=org/model: unknown key; write model.path",
        "2: dataset=org/rows: unknown key; write data.train",
    ]


def test_key_that_stands_twice(tmp_path: Path) -> None:
    path = write(tmp_path, f"{MINIMAL}lora:\n  rank: 4\n  rank: 8\nseed: 1\nseed: 1\n")
    assert refusal(path) == [
        f"{path}:5: lora.rank=8: the key stands on line 4 too; keep one of them",
        f"{path}:7: seed=1: the key stands on line 6 too; keep one of them",
    ]


# Overrides that cannot be laid over the file.


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "seed: is not of the form section.key=value; write train.epochs=3"),
        ("=3", "=3: is not of the form"),
        ("train.=3", "train.=3: is not of the form"),
        ("lora.rank=[", "lora.rank=[: not valid YAML"),
        ("lora={<<: 3}", "not valid YAML"),
        ("data.train.5.path=a", "data.train.5=a: data.train is a list of 1; use data.train.0"),
        ("data.train.path=a", "data.train.path=a: data.train is a list of 1; use data.train.0 to data.train.1"),
        ("seed.low=3", "seed.low=3: seed=1 has no keys beneath it; set seed itself"),
    ],
)
def test_override_that_fits_nowhere(tmp_path: Path, override: str, words: str) -> None:
    [problem] = refusal(write(tmp_path, f"{MINIMAL}seed: 1\n"), override)
    assert problem.startswith("command line: ")
    assert words in problem


# Everything at once.


def test_all_problems_come_in_one_error_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "lora: {rank: 0}\ntrain:\n  epochs: x\n  global_batch_size: 6\ndata:\n  train: {pth: org/rows}\n"
        "  val_fraction: 2\nfoo: 1\n"
    )
    path = write(tmp_path, text)
    assert refusal(path, "seed=-1", "nonsense") == [
        f"{path}:1: lora.rank=0: must be at least 1; the default is 8",
        f"{path}:1: model.path: no model is given; set model.path to a folder or a Hugging Face name, or model.scratch "
        "to an architecture",
        f"{path}:3: train.epochs=x: must be a number",
        f"{path}:4: train.micro_batch_size=4 (the default): must divide train.global_batch_size=6; use 1, 2, 3 or 6",
        f"{path}:6: data.train.0.pth=org/rows: unknown key; did you mean data.train.0.path?",
        f"{path}:7: data.val_fraction=2: must be at least 0 and below 1; the default is 0.0",
        f"{path}:8: foo=1: unknown key; the keys here are model, method, lora, data, train, optimizer, scheduler, "
        "precision, parallel, elastic, eval, checkpoint, logging, wandb, seed, output_dir",
        "command line: nonsense: is not of the form section.key=value; write train.epochs=3, for example",
        "command line: seed=-1: must be from 0 to 4294967295; the default is 0",
    ]


def test_rule_about_two_keys_waits_until_both_are_known(tmp_path: Path) -> None:
    path = write(tmp_path, f"{MINIMAL}train: {{global_batch_size: six, micro_batch_size: 5}}\n")
    [problem] = refusal(path)
    assert "train.global_batch_size=six" in problem


# Paths.


def test_paths_in_the_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "weights").mkdir()
    (tmp_path / "chat.jinja").touch()
    text = "model: {path: weights}\ndata: {train: ./rows.jsonl, validation: org/rows, chat_template: chat.jinja}\n"
    config = load_config(write(tmp_path, text))
    assert config.model.path == str(tmp_path / "weights")
    assert [config.data.train[0].path, config.data.validation[0].path] == [str(tmp_path / "rows.jsonl"), "org/rows"]
    assert config.data.chat_template == str(tmp_path / "chat.jinja")
    assert config.output_dir == tmp_path / "runs" / "default"


def test_paths_of_overrides_are_relative_to_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "here" / "rows.jsonl").touch()
    write(tmp_path, MINIMAL)
    config = load_config(Path("../run.yaml"), ["data.train=rows.jsonl", "output_dir=../out"])
    assert config.data.train[0].path == str(tmp_path / "here" / "rows.jsonl")
    assert config.output_dir == tmp_path / "out"


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    config = load_config(write(tmp_path, MINIMAL), ["model.path=~/weights", "output_dir=~nobody-of-that-name/out"])
    assert config.model.path == str(tmp_path / "weights")
    assert config.output_dir == tmp_path / "here" / "~nobody-of-that-name" / "out"


def test_link_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "rows.jsonl").symlink_to("blob")
    config = load_config(write(tmp_path, "model: {path: m}\ndata: {train: rows.jsonl}"))
    assert config.data.train[0].path == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "template", ["{{ messages }}", "{% for m in messages %}\n" + "{{ m.content }}" * 50 + "{% endfor %}"]
)
def test_template_text_is_left_alone(tmp_path: Path, template: str) -> None:
    config = load_config(write(tmp_path, MINIMAL), [f"data.chat_template={json.dumps(template)}"])
    assert config.data.chat_template == template


@pytest.mark.parametrize(
    "text", ["./a", "../a", "/nowhere/a", "~/a", "a.json", "a/b.jsonl", "a.parquet", "~nobody-here/a"]
)
def test_path_with_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(tmp_path, f"model: {{path: m}}\ndata: {{train: {text}}}\n")
    [problem] = refusal(path)
    looked_at = str(tmp_path / "home" / "a") if text == "~/a" else str((tmp_path / text).resolve())
    assert problem == (
        f"{path}:2: data.train.0.path={text}: there is nothing at {looked_at} (paths are relative to the folder of the "
        "YAML file); give the path of a file or folder"
    )


def test_template_that_is_neither_text_nor_file(tmp_path: Path) -> None:
    [problem] = refusal(write(tmp_path, MINIMAL), "data.chat_template=chat.jinja")
    assert (
        f"there is nothing at {tmp_path / 'here' / 'chat.jinja'} (paths are relative to the current folder)" in problem
    )
    assert "give Jinja text or a file with it" in problem


def test_mlx_is_not_imported() -> None:
    program = "import sys, mlx_distributed.config; print([name for name in sys.modules if name.startswith('mlx')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = set(json.loads(done.stdout.replace("'", '"')))
    assert {name.partition(".")[0] for name in names} == {"mlx_distributed"}


def test_aliases_that_stand_for_far_too_much_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="far too much"):
        load_config(file)
