from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("program_version", "run_id", "wandb_id", "config", "key", "certificate")
    PROGRAM_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    WANDB_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    program_version: str
    run_id: str
    wandb_id: str
    config: str
    key: str
    certificate: str
    def __init__(self, program_version: _Optional[str] = ..., run_id: _Optional[str] = ..., wandb_id: _Optional[str] = ..., config: _Optional[str] = ..., key: _Optional[str] = ..., certificate: _Optional[str] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("program_version", "run_id", "epoch", "reason", "num_committed", "num_steps", "waiting", "members")
    PROGRAM_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    program_version: str
    run_id: str
    epoch: EpochId
    reason: str
    num_committed: int
    num_steps: int
    waiting: str
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    def __init__(self, program_version: _Optional[str] = ..., run_id: _Optional[str] = ..., epoch: _Optional[_Union[EpochId, _Mapping]] = ..., reason: _Optional[str] = ..., num_committed: _Optional[int] = ..., num_steps: _Optional[int] = ..., waiting: _Optional[str] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ...) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("name", "address", "connected", "weight", "num_committed", "speed", "silent_s", "waited_for", "bandwidth", "round_trip_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    WAITED_FOR_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    connected: bool
    weight: float
    num_committed: int
    speed: float
    silent_s: float
    waited_for: bool
    bandwidth: float
    round_trip_s: float
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., connected: _Optional[bool] = ..., weight: _Optional[float] = ..., num_committed: _Optional[int] = ..., speed: _Optional[float] = ..., silent_s: _Optional[float] = ..., waited_for: _Optional[bool] = ..., bandwidth: _Optional[float] = ..., round_trip_s: _Optional[float] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("arrival", "standing", "leave")
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    arrival: Arrival
    standing: Standing
    leave: str
    def __init__(self, arrival: _Optional[_Union[Arrival, _Mapping]] = ..., standing: _Optional[_Union[Standing, _Mapping]] = ..., leave: _Optional[str] = ...) -> None: ...

class FromCoordinator(_message.Message):
    __slots__ = ("term", "commit", "enter", "fetch", "evicted", "refused", "ended")
    TERM_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ENTER_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    term: int
    commit: Commit
    enter: Epoch
    fetch: Fetch
    evicted: Evicted
    refused: str
    ended: Ended
    def __init__(self, term: _Optional[int] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., enter: _Optional[_Union[Epoch, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., evicted: _Optional[_Union[Evicted, _Mapping]] = ..., refused: _Optional[str] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class EpochId(_message.Message):
    __slots__ = ("term", "sequence")
    TERM_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    term: int
    sequence: int
    def __init__(self, term: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("step", "digest")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    step: int
    digest: str
    def __init__(self, step: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class Seat(_message.Message):
    __slots__ = ("name", "incarnation", "address", "weight", "bandwidth")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    address: str
    weight: float
    bandwidth: float
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., weight: _Optional[float] = ..., bandwidth: _Optional[float] = ...) -> None: ...

class Epoch(_message.Message):
    __slots__ = ("id", "committed", "seats", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: EpochId
    committed: Outcome
    seats: _containers.RepeatedCompositeFieldContainer[Seat]
    reason: str
    def __init__(self, id: _Optional[_Union[EpochId, _Mapping]] = ..., committed: _Optional[_Union[Outcome, _Mapping]] = ..., seats: _Optional[_Iterable[_Union[Seat, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class Arrival(_message.Message):
    __slots__ = ("name", "incarnation", "address", "run_id", "program_version", "config_digest", "standing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    address: str
    run_id: str
    program_version: str
    config_digest: str
    standing: Standing
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., run_id: _Optional[str] = ..., program_version: _Optional[str] = ..., config_digest: _Optional[str] = ..., standing: _Optional[_Union[Standing, _Mapping]] = ...) -> None: ...

class Standing(_message.Message):
    __slots__ = ("serial", "committed", "epoch", "prepared", "speed", "waiting_for", "lost", "bandwidth", "round_trip_s")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    serial: int
    committed: Outcome
    epoch: EpochId
    prepared: Outcome
    speed: float
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    lost: Loss
    bandwidth: float
    round_trip_s: float
    def __init__(self, serial: _Optional[int] = ..., committed: _Optional[_Union[Outcome, _Mapping]] = ..., epoch: _Optional[_Union[EpochId, _Mapping]] = ..., prepared: _Optional[_Union[Outcome, _Mapping]] = ..., speed: _Optional[float] = ..., waiting_for: _Optional[_Iterable[str]] = ..., lost: _Optional[_Union[Loss, _Mapping]] = ..., bandwidth: _Optional[float] = ..., round_trip_s: _Optional[float] = ...) -> None: ...

class Loss(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("outcome", "epoch", "weights")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    epoch: EpochId
    weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ..., epoch: _Optional[_Union[EpochId, _Mapping]] = ..., weights: _Optional[_Iterable[float]] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("outcome", "sources")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    sources: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ..., sources: _Optional[_Iterable[str]] = ...) -> None: ...

class Evicted(_message.Message):
    __slots__ = ("reason", "must_fetch")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MUST_FETCH_FIELD_NUMBER: _ClassVar[int]
    reason: str
    must_fetch: bool
    def __init__(self, reason: _Optional[str] = ..., must_fetch: _Optional[bool] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("reason", "failed")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    failed: bool
    def __init__(self, reason: _Optional[str] = ..., failed: _Optional[bool] = ...) -> None: ...
