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
