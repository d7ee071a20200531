from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from elastic_command import open_config
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.cli.elastic.join import config_here, missing_files
from mlx_distributed.config import Config, DataConfig, ModelConfig, SourceConfig, to_yaml
from mlx_distributed.errors import ConfigError

ADDRESS = "10.0.0.7:4000"


def test_files_that_are_not_here_are_named(tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").touch()
    sources = tuple(SourceConfig(path=path) for path in (str(tmp_path / "here.jsonl"), "/gone/rows.jsonl", "org/rows"))
    data = DataConfig(train=sources, validation=(SourceConfig(path="/gone/too"),), chat_template="/gone/chat.jinja")
    config = replace(Config(), model=ModelConfig(path="/gone/model"), data=data)
    assert missing_files(to_yaml(config)) == [
        "model.path=/gone/model",
        "data.train.1.path=/gone/rows.jsonl",
        "data.validation.0.path=/gone/too",
        "data.chat_template=/gone/chat.jinja",
    ]
    with pytest.raises(ConfigError, match=r"the run at 10\.0\.0\.7:4000 trains on what is not on this machine: model"):
        config_here(to_yaml(config), ADDRESS, [])


@given(st.sampled_from(["{{ messages }}", None]), st.sampled_from(["org/model", None]))
def test_names_and_templates_are_no_files(template: str | None, model: str | None) -> None:
    data = DataConfig(train=(SourceConfig(path="org/rows"),), chat_template=template)
    assert missing_files(to_yaml(replace(Config(), model=ModelConfig(path=model), data=data))) == []


def test_all_but_the_folder_and_the_number_of_workers_is_that_of_the_run(tmp_path: Path) -> None:
    config = open_config(tmp_path, "elastic.listen=10.0.0.7:4000", "seed=7", "parallel.nproc=2")
    here = config_here(to_yaml(config), ADDRESS, ["parallel.nproc=1", f"output_dir={tmp_path / 'mine'}"])
    assert here.output_dir == tmp_path / "mine"
    assert here.parallel.nproc == 1
    assert replace(here, output_dir=config.output_dir, parallel=config.parallel) == config
