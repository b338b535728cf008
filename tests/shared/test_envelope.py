"""Signatures: who, for what, and nothing else."""

import base64
import json
import pickle
import stat

import pytest

from cloister_shared import envelope
from cloister_shared.envelope import Identity, new_identity, read_identity, read_roster, save_roster, verify
from cloister_shared.errors import EnvelopeRefused, KeyBroken
from cloister_shared.wire import Advert, Statement, read_signed, sign


@pytest.fixture
def ash(tmp_path) -> Identity:
    return new_identity(tmp_path / "ash.key")


def test_a_signed_payload_comes_back_with_its_signer(ash):
    assert verify(ash.sign("advert", b"{}"), "advert", {"ash": ash.public}) == ("ash", b"{}")


def test_the_envelope_is_dsse(ash):
    """The encoding that is signed, written out from the standard."""
    held = json.loads(ash.sign("advert", b"hello"))
    kind = "application/vnd.cloister.advert+json"
    assert held["payloadType"] == kind
    assert base64.b64decode(held["payload"]) == b"hello"
    signed = b"DSSEv1 " + str(len(kind)).encode() + b" " + kind.encode() + b" 5 hello"
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(ash.public))
    key.verify(base64.b64decode(held["signatures"][0]["sig"]), signed)


def changed(text: str, **parts: object) -> str:
    return json.dumps({**json.loads(text), **parts})


MISTAKES = {
    "another purpose": (lambda e: e, "statement", "was shown as statement"),
    "purpose rewritten": (
        lambda e: changed(e, payloadType="application/vnd.cloister.statement+json"),
        "statement",
        "signature that its key did not make",
    ),
    "payload changed": (
        lambda e: changed(e, payload=base64.b64encode(b"{ }").decode()),
        "advert",
        "signature that its key did not make",
    ),
    "not base64": (lambda e: changed(e, payload="%%%"), "advert", "no signed envelope"),
    "no signature": (lambda e: changed(e, signatures=[]), "advert", "no signed envelope"),
    "two signatures": (
        lambda e: changed(e, signatures=json.loads(e)["signatures"] * 2),
        "advert",
        "no signed envelope",
    ),
    "another key": (lambda e: changed(e, extra=1), "advert", "no signed envelope"),
    "a list": (lambda e: "[]", "advert", "no signed envelope"),
    "not JSON": (lambda e: "{", "advert", "no signed envelope"),
    "deep": (lambda e: "[" * 100_000, "advert", "no signed envelope"),
    "nothing": (lambda e: "", "advert", "no signed envelope"),
    "unknown signer": (
        lambda e: changed(e, signatures=[{**json.loads(e)["signatures"][0], "keyid": "0" * 16}]),
        "advert",
        "not pinned here",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_mistake_is_refused(ash, name):
    spoil, purpose, said = MISTAKES[name]
    with pytest.raises(EnvelopeRefused, match=said):
        verify(spoil(ash.sign("advert", b"{}")), purpose, {"ash": ash.public})


def test_nobody_signs_in_anothers_name(ash, tmp_path):
    beech = new_identity(tmp_path / "beech.key")
    roster = {"ash": ash.public, "beech": beech.public}
    said = Statement(transcript="0" * 64, site="ash", masked="m")
    assert read_signed(sign(ash, said), Statement, roster) == said
    with pytest.raises(EnvelopeRefused, match="beech signed a statement in another hospital's name"):
        read_signed(sign(beech, said), Statement, roster)
    with pytest.raises(EnvelopeRefused, match="was shown as advert"):
        read_signed(sign(ash, said), Advert, roster)
    with pytest.raises(EnvelopeRefused, match="cannot be read: key: "):
        read_signed(ash.sign("advert", b'{"run":"r","plan":"p","site":"ash","min_cohort":3}'), Advert, roster)


# --- keys on disk --------------------------------------------------------------------------------------------
def test_a_key_is_for_its_owner_alone_and_never_shown(ash, tmp_path):
    path = tmp_path / "ash.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_identity(path).public == ash.public
    secret = path.read_text()
    assert secret not in repr(ash)
    assert secret not in str(vars(ash))
    with pytest.raises(TypeError, match="does not travel"):
        pickle.dumps(ash)


def test_a_key_is_never_replaced(ash, tmp_path):
    with pytest.raises(KeyBroken, match="exists"):
        new_identity(tmp_path / "ash.key")


def test_a_key_that_others_can_read_is_refused(ash, tmp_path):
    (tmp_path / "ash.key").chmod(0o640)
    with pytest.raises(KeyBroken, match="Others on this machine can read"):
        read_identity(tmp_path / "ash.key")


@pytest.mark.parametrize("held", ["", "zz", "ab" * 31, "é"])
def test_a_damaged_key_is_refused_without_being_quoted(tmp_path, held):
    path = tmp_path / "ash.key"
    path.touch(0o600)
    path.write_text(held, encoding="utf-8")
    with pytest.raises(KeyBroken, match="is no signing key") as refused:
        read_identity(path)
    assert not held or held not in str(refused.value)
    assert refused.value.__suppress_context__


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(KeyBroken, match="is not there"):
        read_identity(tmp_path / "none.key")


def test_a_roster_pins_each_key_once(ash, tmp_path):
    path = tmp_path / "roster.json"
    save_roster(path, {"ash": ash.public})
    assert read_roster(path) == {"ash": ash.public}
    save_roster(path, {"ash": ash.public, "oak": ash.public})
    with pytest.raises(KeyBroken, match="one key under two names"):
        read_roster(path)
    for held in ("", "[]", '{"ash": 3}', '{"ash": "zz"}', '{"ash": "ab"}'):
        path.write_text(held)
        with pytest.raises(KeyBroken, match="no roster"):
            read_roster(path)
    with pytest.raises(KeyBroken, match="no roster"):
        read_roster(tmp_path / "none.json")


def test_key_ids_are_short_and_of_the_public_half(ash):
    assert len(envelope.key_id(ash.public)) == 16
    assert envelope.key_id(ash.public) in repr(ash)
