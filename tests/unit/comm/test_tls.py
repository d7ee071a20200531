"""Groups over TLS on loopback, and who is kept out of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import grpc
import mlx.core as mx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from mlx_distributed.comm.buckets import make_layout, to_buckets
from mlx_distributed.comm.group import join_group
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.comm.grpc_streams import METHOD, SERVICE
from mlx_distributed.comm.hello import Membership
from mlx_distributed.comm.tls import CLOCK_SKEW, LIFETIME, Identity
from mlx_distributed.errors import CommError

TIMEOUT_S = 1.0
NOW = datetime.now(UTC)


def meet(identities: Sequence[Identity | None], timeout_s: float) -> list[float | CommError]:
    """What each rank gets from joining a group, with these identities, and adding up the ranks + 1."""
    barrier = threading.Barrier(len(identities))
    addresses = [""] * len(identities)
    results: list[float | CommError] = [0.0] * len(identities)

    def be(rank: int, identity: Identity | None) -> None:
        def exchange(address: str) -> list[str]:
            addresses[rank] = address
            barrier.wait(20)
            return addresses

        try:
            comm = join_group(rank, len(identities), "run", timeout_s, "127.0.0.1:0", exchange, identity=identity)
            arrays = {"w": mx.full(700_001, comm.rank + 1.0)}
            layout = make_layout(arrays)
            parts = {(comm.rank, comm.rank + 1): to_buckets(layout, arrays)[0]}
            ((summed,),) = comm.all_reduce(layout, comm.size, [parts], "a test")
            results[rank] = summed.mean().item()
            comm.close()
        except CommError as error:
            results[rank] = error

    threads = [threading.Thread(target=be, args=each) for each in enumerate(identities)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_group_over_tls_sums() -> None:
    identity = Identity.create(NOW)
    assert meet([identity] * 3, timeout_s=20) == [6.0] * 3


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("without TLS", ("with the certificate of this run", "without TLS")),
        ("a group without TLS", ("no connection", "does not show the certificate of this run")),
        ("of another run", ("with the certificate of this run", "does not show the certificate of this run")),
        ("of the past", ("with the certificate of this run", "does not show the certificate of this run")),
        ("of the future", ("with the certificate of this run", "does not show the certificate of this run")),
    ],
)
def test_who_does_not_show_the_certificate_of_the_run_is_refused(which: str, words: tuple[str, str]) -> None:
    """Rank 0 dials; rank 1 listens, and hears of no connection."""
    identity = Identity.create(NOW)
    past, future = (Identity.create(NOW + sign * (LIFETIME + CLOCK_SKEW)) for sign in (-1, 1))
    dialling, listening = {
        "without TLS": (None, identity),
        "a group without TLS": (identity, None),
        "of another run": (Identity.create(NOW), identity),
        "of the past": (past, past),
        "of the future": (future, future),
    }[which]
    start_s = time.monotonic()
    errors = meet([dialling, listening], TIMEOUT_S)
    assert time.monotonic() - start_s < TIMEOUT_S + 2.0
    for rank, (error, said) in enumerate(zip(errors, reversed(words), strict=True)):
        assert isinstance(error, CommError)
        assert error.peer == 1 - rank
        assert said in error.reason


def test_to_know_the_certificate_is_not_enough() -> None:
    """It is shown to whoever connects; only who holds the key can show it in turn."""
    run, other = Identity.create(NOW), Identity.create(NOW)
    comm = GrpcComm(1, 2, "run", identity=run)
    pairs = {"the key": (run.key, run.certificate), "another": (other.key, other.certificate), "none": (None, None)}
    for whose, pair in pairs.items():
        key, certificate = (pem and pem.encode() for pem in pair)
        credentials = grpc.ssl_channel_credentials(run.certificate.encode(), key, certificate)
        name = ("grpc.ssl_target_name_override", Identity.server_name)
        with grpc.secure_channel(comm.address, credentials, options=[name]) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([b"noise"]), timeout=20)
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
        reached = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT
        assert (caught.value.code() in reached) == (whose == "the key")
    comm.close()


def test_the_certificate_is_valid_from_a_day_ago_and_the_key_is_in_no_repr() -> None:
    identity = Identity.create(NOW)
    certificate = x509.load_pem_x509_certificate(identity.certificate.encode())
    assert certificate.not_valid_before_utc == (NOW - timedelta(days=1)).replace(microsecond=0)
    assert certificate.not_valid_after_utc == (NOW + LIFETIME).replace(microsecond=0)
    assert identity.fingerprint == certificate.fingerprint(hashes.SHA256()).hex()
    assert identity.key.splitlines()[1] not in repr(identity)
    assert "PRIVATE KEY" in identity.key
    assert "PRIVATE KEY" not in repr(identity) + str(identity)


def test_the_secret_of_a_run_is_in_no_repr() -> None:
    assert "a-secret" not in repr(Membership("a-secret", 0, 0, 2))
