"""Generate the Python messages of `protos/` into `mlx_distributed/comm/_pb`.

Run:
    uv run python scripts/generate_protos.py

There are no service stubs: the streams carry raw bytes, so `grpc_comm` names their methods itself.
"""

from __future__ import annotations

from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "protos" / "mlx_distributed" / "v1"
PACKAGE = "mlx_distributed/comm/_pb"


def generate(out: Path) -> None:
    """Write `<name>_pb2.py` and `<name>_pb2.pyi` of every proto into `PACKAGE` beneath the folder `out`.

    Raises:
        SystemExit: a proto cannot be compiled; protoc has said why on stderr.
    """
    # Mapped into the package, the files import each other by their full names, and their own names, which the
    # descriptor pool of the process shares with every other library, are unique.
    arguments = [f"--proto_path={PACKAGE}={PROTOS}", f"--python_out={out}", f"--pyi_out={out}"]
    names = [f"{PACKAGE}/{path.name}" for path in sorted(PROTOS.glob("*.proto"))]
    status = protoc.main(["protoc", *arguments, *names])
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    generate(ROOT)
