from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("limit", [(256, 1024), (1024, 65536)])
def test_importing_mlx_lm_leaves_the_process_alone(limit: tuple[int, int]) -> None:
    code = f"""
import resource, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
limit = ({limit[0]}, min({limit[1]}, hard) if hard != resource.RLIM_INFINITY else {limit[1]})
resource.setrlimit(resource.RLIMIT_NOFILE, limit)
setrlimit = resource.setrlimit
import mlx_distributed.models
assert "mlx_lm" in sys.modules
assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit
assert resource.setrlimit is setrlimit
assert not {{"wandb", "datasets", "torch"}} & set(sys.modules), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_stays_importable() -> None:
    code = "import wandb, mlx_distributed.models, sys; assert sys.modules['wandb'] is wandb"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_finds_the_names_that_it_would_find_by_itself() -> None:
    code = """
import importlib.util, pathlib
import mlx_distributed.models
from transformers.utils import import_utils
spec = importlib.util.spec_from_file_location("transformers.utils.by_itself", import_utils.__file__)
by_itself = importlib.util.module_from_spec(spec)
spec.loader.exec_module(by_itself)
folder = str(pathlib.Path(import_utils.__file__).parents[1] / "models")
assert import_utils.define_import_structure(folder) == by_itself.define_import_structure(folder)
# It looks once where it would look twice: 550 folders do not fit into 128 places.
assert import_utils.create_import_structure_from_path.cache_info().maxsize is None
assert by_itself.create_import_structure_from_path.cache_info().maxsize == 128
"""
    subprocess.run([sys.executable, "-c", code], check=True)
