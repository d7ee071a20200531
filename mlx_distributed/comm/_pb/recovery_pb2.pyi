from mlx_distributed.comm._pb import membership_pb2 as _membership_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StateRequest(_message.Message):
    __slots__ = ("token", "hold", "manifest", "slices")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    token: str
    hold: int
    manifest: StateItem
    slices: StateSlices
    def __init__(self, token: _Optional[str] = ..., hold: _Optional[int] = ..., manifest: _Optional[_Union[StateItem, _Mapping]] = ..., slices: _Optional[_Union[StateSlices, _Mapping]] = ...) -> None: ...

class StateItem(_message.Message):
    __slots__ = ("outcome", "sums")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    outcome: _membership_pb2.Outcome
    sums: bool
    def __init__(self, outcome: _Optional[_Union[_membership_pb2.Outcome, _Mapping]] = ..., sums: _Optional[bool] = ...) -> None: ...

class StateSlices(_message.Message):
    __slots__ = ("item", "numbers")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    item: StateItem
    numbers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, item: _Optional[_Union[StateItem, _Mapping]] = ..., numbers: _Optional[_Iterable[int]] = ...) -> None: ...

class StateAnswer(_message.Message):
    __slots__ = ("refused", "held", "counters", "num_arrays", "arrays", "hashes")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_ARRAYS_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    refused: str
    held: _containers.RepeatedCompositeFieldContainer[_membership_pb2.Outcome]
    counters: _containers.ScalarMap[str, int]
    num_arrays: int
    arrays: _containers.RepeatedCompositeFieldContainer[StateArray]
    hashes: bytes
    def __init__(self, refused: _Optional[str] = ..., held: _Optional[_Iterable[_Union[_membership_pb2.Outcome, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., num_arrays: _Optional[int] = ..., arrays: _Optional[_Iterable[_Union[StateArray, _Mapping]]] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class StateArray(_message.Message):
    __slots__ = ("name", "kind")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...
