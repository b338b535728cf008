from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("version", "request", "identity", "proof")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    version: str
    request: str
    identity: str
    proof: str
    def __init__(self, version: _Optional[str] = ..., request: _Optional[str] = ..., identity: _Optional[str] = ..., proof: _Optional[str] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("version", "certificate", "roster")
    class RosterEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    version: str
    certificate: str
    roster: _containers.ScalarMap[str, str]
    def __init__(self, version: _Optional[str] = ..., certificate: _Optional[str] = ..., roster: _Optional[_Mapping[str, str]] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("version", "site", "time", "not_after")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    version: str
    site: str
    time: float
    not_after: float
    def __init__(self, version: _Optional[str] = ..., site: _Optional[str] = ..., time: _Optional[float] = ..., not_after: _Optional[float] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: str
    def __init__(self, request: _Optional[str] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: str
    def __init__(self, certificate: _Optional[str] = ...) -> None: ...

class StudiesRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class StudyNews(_message.Message):
    __slots__ = ("digest", "offer", "state", "reason", "round", "rounds", "took_part", "decision")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    TOOK_PART_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offer: str
    state: str
    reason: str
    round: int
    rounds: int
    took_part: _containers.RepeatedScalarFieldContainer[str]
    decision: str
    def __init__(self, digest: _Optional[str] = ..., offer: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., took_part: _Optional[_Iterable[str]] = ..., decision: _Optional[str] = ...) -> None: ...

class DecideRequest(_message.Message):
    __slots__ = ("envelope",)
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    envelope: str
    def __init__(self, envelope: _Optional[str] = ...) -> None: ...

class DecideReply(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class InviteRequest(_message.Message):
    __slots__ = ("hospital", "hours")
    HOSPITAL_FIELD_NUMBER: _ClassVar[int]
    HOURS_FIELD_NUMBER: _ClassVar[int]
    hospital: str
    hours: int
    def __init__(self, hospital: _Optional[str] = ..., hours: _Optional[int] = ...) -> None: ...

class InviteReply(_message.Message):
    __slots__ = ("invite",)
    INVITE_FIELD_NUMBER: _ClassVar[int]
    invite: str
    def __init__(self, invite: _Optional[str] = ...) -> None: ...

class HospitalsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hospital(_message.Message):
    __slots__ = ("name", "key_id", "standing", "online", "version", "seen", "not_after")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    key_id: str
    standing: str
    online: bool
    version: str
    seen: float
    not_after: float
    def __init__(self, name: _Optional[str] = ..., key_id: _Optional[str] = ..., standing: _Optional[str] = ..., online: bool = ..., version: _Optional[str] = ..., seen: _Optional[float] = ..., not_after: _Optional[float] = ...) -> None: ...

class HospitalsReply(_message.Message):
    __slots__ = ("hospitals",)
    HOSPITALS_FIELD_NUMBER: _ClassVar[int]
    hospitals: _containers.RepeatedCompositeFieldContainer[Hospital]
    def __init__(self, hospitals: _Optional[_Iterable[_Union[Hospital, _Mapping]]] = ...) -> None: ...

class ExpelRequest(_message.Message):
    __slots__ = ("hospital", "reason")
    HOSPITAL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    hospital: str
    reason: str
    def __init__(self, hospital: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ExpelReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("plan", "file", "hospitals")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    HOSPITALS_FIELD_NUMBER: _ClassVar[int]
    plan: str
    file: str
    hospitals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, plan: _Optional[str] = ..., file: _Optional[str] = ..., hospitals: _Optional[_Iterable[str]] = ...) -> None: ...

class SteerRequest(_message.Message):
    __slots__ = ("study", "verb", "reason")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    study: str
    verb: str
    reason: str
    def __init__(self, study: _Optional[str] = ..., verb: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("studies",)
    STUDIES_FIELD_NUMBER: _ClassVar[int]
    studies: _containers.RepeatedCompositeFieldContainer[StudyReply]
    def __init__(self, studies: _Optional[_Iterable[_Union[StudyReply, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("study",)
    STUDY_FIELD_NUMBER: _ClassVar[int]
    study: str
    def __init__(self, study: _Optional[str] = ...) -> None: ...

class StudyReply(_message.Message):
    __slots__ = ("digest", "name", "state", "reason", "round", "rounds", "decisions", "history")
    class DecisionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    digest: str
    name: str
    state: str
    reason: str
    round: int
    rounds: int
    decisions: _containers.ScalarMap[str, str]
    history: _containers.RepeatedCompositeFieldContainer[RoundReply]
    def __init__(self, digest: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., decisions: _Optional[_Mapping[str, str]] = ..., history: _Optional[_Iterable[_Union[RoundReply, _Mapping]]] = ...) -> None: ...

class RoundReply(_message.Message):
    __slots__ = ("round", "took_part", "missed", "numbers", "seconds")
    class MissedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TOOK_PART_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    round: int
    took_part: _containers.RepeatedScalarFieldContainer[str]
    missed: _containers.ScalarMap[str, str]
    numbers: _containers.ScalarMap[str, float]
    seconds: float
    def __init__(self, round: _Optional[int] = ..., took_part: _Optional[_Iterable[str]] = ..., missed: _Optional[_Mapping[str, str]] = ..., numbers: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[float] = ...) -> None: ...

class AccountRequest(_message.Message):
    __slots__ = ("name", "verb", "role")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    verb: str
    role: str
    def __init__(self, name: _Optional[str] = ..., verb: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class AccountReply(_message.Message):
    __slots__ = ("token", "accounts")
    class AccountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    token: str
    accounts: _containers.ScalarMap[str, str]
    def __init__(self, token: _Optional[str] = ..., accounts: _Optional[_Mapping[str, str]] = ...) -> None: ...

class AuditRequest(_message.Message):
    __slots__ = ("last",)
    LAST_FIELD_NUMBER: _ClassVar[int]
    last: int
    def __init__(self, last: _Optional[int] = ...) -> None: ...

class AuditReply(_message.Message):
    __slots__ = ("entries", "head")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedScalarFieldContainer[str]
    head: str
    def __init__(self, entries: _Optional[_Iterable[str]] = ..., head: _Optional[str] = ...) -> None: ...
