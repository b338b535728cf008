"""Whose certificate it is, who may issue one, who lost theirs, and what TLS makes of each."""

import os
import pickle
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from cloister_shared.certificates import (
    EARLY,
    Authority,
    Kind,
    Revocations,
    bearer,
    client_context,
    key_pem,
    new_authority,
    new_key,
    public_key,
    read_authority,
    read_key,
    read_request,
    request,
    revoked,
    server_context,
)
from cloister_shared.errors import EnrolmentRefused, KeyBroken
from cloister_shared.names import site_name

MONTH = timedelta(days=30)


@pytest.fixture
def authority(tmp_path) -> Authority:
    return new_authority(tmp_path, "Heart consortium")


def issued(authority: Authority, folder: Path, kind: Kind, name: str, lifetime=MONTH, hosts=()) -> tuple[Path, Path]:
    """Files of a certificate and its key."""
    key = new_key(folder / f"{kind}.key")
    path = folder / f"{kind}.crt"
    path.write_bytes(authority.issue(public_key(key), kind, name, lifetime, hosts))
    return path, folder / f"{kind}.key"


# --- names -------------------------------------------------------------------------------------------------
NAMES = [
    "ash",
    "St Mary's",
    "Hôpital Saint-Louis",
    "東京大学医学部附属病院",
    "हिन्दी अस्पताल",
    "A & E (North), No. 2",
    "a" * 60,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", Kind)
def test_a_certificate_gives_the_name_back_exactly(authority, tmp_path, kind, name):
    key = new_key(tmp_path / "key")
    said = bearer(authority.issue(public_key(key), kind, name, MONTH))
    assert (said.kind, said.name, said.public_key) == (kind, name, public_key(key))


@pytest.mark.parametrize(
    "name", ["", " ash", "ash ", "a  b", "a/b", "..", "-ash", "a\nb", "a%20b", "a:b", "\u202eash", "a\u200bb", "é" * 31]
)
def test_what_is_no_name_is_refused(authority, tmp_path, name):
    with pytest.raises(ValueError, match="a name is letters"):
        site_name(name)
    with pytest.raises(EnrolmentRefused, match="No certificate for"):
        authority.issue(public_key(new_key(tmp_path / "key")), Kind.SITE, name, MONTH)


def test_one_name_written_in_two_ways_is_one_name():
    assert site_name("Ho\u0302pital") == "Hôpital"


# --- keys --------------------------------------------------------------------------------------------------
def test_a_key_is_its_owners_alone_and_is_never_replaced(tmp_path):
    path = tmp_path / "key"
    key = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key_pem(read_key(path)) == key_pem(key)
    with pytest.raises(KeyBroken, match="exists"):
        new_key(path)


def test_a_key_that_others_can_read_is_refused(tmp_path):
    new_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(KeyBroken, match="chmod 600"):
        read_key(tmp_path / "key")


@pytest.mark.parametrize(
    "text", [None, "", "no key", "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n"]
)
def test_what_is_no_key_is_refused_without_quoting_it(tmp_path, text):
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text)
        path.chmod(0o600)
    with pytest.raises(KeyBroken) as raised:
        read_key(path)
    assert "secret" not in str(raised.value)


def test_flower_names_the_key_as_we_do(tmp_path):
    key = new_key(tmp_path / "key")
    assert public_key_to_bytes(key.public_key()) == public_key(key)


# --- the authority -----------------------------------------------------------------------------------------
def test_an_authority_is_read_as_it_was_made(authority, tmp_path):
    assert read_authority(tmp_path).certificate == authority.certificate
    with pytest.raises(KeyBroken, match="exists"):
        new_authority(tmp_path, "Another")


def test_an_authority_with_another_key_is_refused(authority, tmp_path):
    (tmp_path / "ca.key").unlink()
    new_key(tmp_path / "ca.key")
    with pytest.raises(KeyBroken, match=r"not the certificate of ca\.key"):
        read_authority(tmp_path)


def test_an_authority_neither_travels_nor_shows_its_key(authority):
    assert repr(authority) == "Authority(CN=Heart consortium)"
    with pytest.raises(TypeError, match="does not travel"):
        pickle.dumps(authority)


def test_a_certificate_allows_a_slow_clock_and_ends_with_the_authority(authority, tmp_path):
    said = bearer(authority.issue(public_key(new_key(tmp_path / "key")), Kind.SITE, "ash", timedelta(days=99_999)))
    assert datetime.now(UTC) - said.not_before >= EARLY
    assert said.not_after == x509.load_pem_x509_certificate(authority.certificate).not_valid_after_utc


def test_a_request_proves_that_its_key_is_held(tmp_path):
    key, other = new_key(tmp_path / "key"), new_key(tmp_path / "other")
    assert read_request(request(key, "ash")) == public_key(key)
    der = x509.load_pem_x509_csr(request(key, "ash")).public_bytes(Encoding.DER)
    mine, theirs = (k.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint) for k in (key, other))
    stolen = x509.load_der_x509_csr(der.replace(mine, theirs)).public_bytes(Encoding.PEM)
    with pytest.raises(EnrolmentRefused, match="request is damaged"):
        read_request(stolen)


@pytest.mark.parametrize("pem", [b"", b"no request", b"-----BEGIN CERTIFICATE REQUEST-----\n" + b"A" * 100_000])
def test_what_is_no_request_is_refused(pem):
    with pytest.raises(EnrolmentRefused, match="request is damaged"):
        read_request(pem)


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)], ids=["P-384", "RSA"]
)
def test_a_key_of_another_kind_is_refused(authority, key):
    with pytest.raises(EnrolmentRefused, match="not ECDSA P-256"):
        read_request(request(key, "ash"))
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(EnrolmentRefused, match="not ECDSA P-256"):
        authority.issue(pem, Kind.SITE, "ash", MONTH)


def test_a_request_cannot_choose_its_name(authority, tmp_path):
    asked = read_request(request(new_key(tmp_path / "key"), "oak"))
    assert bearer(authority.issue(asked, Kind.SITE, "ash", MONTH)).name == "ash"


# --- whose certificate it is ---------------------------------------------------------------------------------
FORMS = {
    "no name": [],
    "a host alone": [x509.DNSName("ash")],
    "two names": [
        x509.UniformResourceIdentifier("cloister:site:ash"),
        x509.UniformResourceIdentifier("cloister:site:oak"),
    ],
    "another kind": [x509.UniformResourceIdentifier("cloister:nurse:ash")],
    "another scheme": [x509.UniformResourceIdentifier("https:site:ash")],
    "more parts": [x509.UniformResourceIdentifier("cloister:site:ash:oak")],
    "no hospital": [x509.UniformResourceIdentifier("cloister:site:")],
    "a path": [x509.UniformResourceIdentifier("cloister:site:..%2Foak")],
    "written in another way": [x509.UniformResourceIdentifier("cloister:site:%61sh")],
    "no UTF-8": [x509.UniformResourceIdentifier("cloister:site:a%FF")],
}


@pytest.mark.parametrize("names", FORMS.values(), ids=FORMS)
def test_a_certificate_of_another_form_is_nobodys(names):
    key = ec.generate_private_key(ec.SECP256R1())
    called = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ash")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder(called, called, key.public_key(), 7, now, now + MONTH)
    if names:
        built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
    with pytest.raises(EnrolmentRefused, match="not one of this consortium's"):
        bearer(built.sign(key, SHA256()).public_bytes(Encoding.PEM))


@pytest.mark.parametrize("octets", [b"", b"no certificate", os.urandom(300), b"-----BEGIN CERTIFICATE-----\nAA\n"])
def test_what_is_no_certificate_is_nobodys(octets):
    with pytest.raises(EnrolmentRefused, match="not one of this consortium's"):
        bearer(octets)


# --- revocation ----------------------------------------------------------------------------------------------
def test_a_list_names_the_serials_that_were_revoked(authority):
    now = datetime.now(UTC)
    assert revoked(authority.crl({}), authority.certificate) == frozenset()
    assert revoked(authority.crl({7: now, 2**158: now}), authority.certificate) == {7, 2**158}


def test_a_list_of_another_authority_of_the_same_name_counts_for_nothing(authority, tmp_path):
    (tmp_path / "other").mkdir()
    theirs = new_authority(tmp_path / "other", "Heart consortium").crl({})
    with pytest.raises(EnrolmentRefused, match="not signed by the consortium's authority"):
        revoked(theirs, authority.certificate)


def test_a_revocation_counts_from_the_next_look(authority, tmp_path):
    (tmp_path / "revoked.crl").write_bytes(authority.crl({}))
    gate = Revocations(tmp_path)
    assert 7 not in gate
    beside = tmp_path / "revoked.tmp"
    beside.write_bytes(authority.crl({7: datetime.now(UTC)}))
    beside.replace(tmp_path / "revoked.crl")
    assert 7 in gate
    assert 8 not in gate


@pytest.mark.parametrize("held", [None, b"", b"no list", "another's"], ids=["missing", "empty", "damaged", "another's"])
def test_without_a_sound_list_everybody_is_refused_until_there_is_one(authority, tmp_path, held):
    gate, path = Revocations(tmp_path), tmp_path / "revoked.crl"
    path.write_bytes(authority.crl({}))
    assert 8 not in gate
    (tmp_path / "other").mkdir()
    path.unlink()
    if held is not None:
        theirs = new_authority(tmp_path / "other", "Heart consortium").crl({})
        path.write_bytes(held if isinstance(held, bytes) else theirs)
    assert 8 in gate
    path.write_bytes(authority.crl({}))
    assert 8 not in gate


# --- TLS -----------------------------------------------------------------------------------------------------
def shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "127.0.0.1") -> bytes:
    """The client's certificate as the server sees it, once a word went each way."""
    ours, theirs = socket.socketpair()
    seen: list[bytes | Exception] = []

    def answer() -> None:
        try:
            with server.wrap_socket(ours, server_side=True) as tls:
                tls.sendall(tls.recv(1))
                seen.append(tls.getpeercert(binary_form=True) or b"")
        except OSError as error:
            seen.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    heard: list[Exception] = []
    try:
        with client.wrap_socket(theirs, server_hostname=host) as tls:
            tls.sendall(b"?")
            tls.recv(1)
    except OSError as error:
        heard.append(error)
    theirs.close()
    thread.join(10)
    ours.close()
    errors = [error for error in (*heard, *seen) if isinstance(error, ssl.SSLCertVerificationError)]
    for error in (*errors, *seen, *heard):  # whoever refused knows why; the other heard an alert
        if isinstance(error, Exception):
            raise error
    (certificate,) = [said for said in seen if isinstance(said, bytes)]
    return certificate


@pytest.fixture
def server(authority, tmp_path) -> ssl.SSLContext:
    certificate, key = issued(
        authority, tmp_path, Kind.COORDINATOR, "Heart consortium", hosts=["127.0.0.1", "heart.example"]
    )
    return server_context(certificate, key, tmp_path / "ca.crt")


def test_a_hospital_and_the_coordinator_know_each_other(authority, server, tmp_path):
    client = client_context(*issued(authority, tmp_path, Kind.SITE, "St Mary's"), tmp_path / "ca.crt")
    assert bearer(shake(server, client)).name == "St Mary's"
    assert bearer(shake(server, client, "heart.example")).kind is Kind.SITE
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, client, "other.example")


def outsider(authority: Authority, folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=folder / "ca.crt")


def of_another_authority(authority: Authority, folder: Path) -> ssl.SSLContext:
    (folder / "other").mkdir()
    theirs = new_authority(folder / "other", "Heart consortium")
    return client_context(*issued(theirs, folder, Kind.SITE, "ash"), folder / "ca.crt")


def self_issued_by_a_hospital(authority: Authority, folder: Path) -> ssl.SSLContext:
    """An enrolled hospital signs a certificate for another name with its own key."""
    certificate, key = issued(authority, folder, Kind.SITE, "ash")
    (folder / "mine").mkdir()
    rogue = Authority(read_key(key), x509.load_pem_x509_certificate(certificate.read_bytes()))
    forged, mine = issued(rogue, folder / "mine", Kind.SITE, "oak")
    forged.write_bytes(forged.read_bytes() + certificate.read_bytes())
    return client_context(forged, mine, folder / "ca.crt")


def expired(authority: Authority, folder: Path) -> ssl.SSLContext:
    return client_context(*issued(authority, folder, Kind.SITE, "ash", timedelta(seconds=-1)), folder / "ca.crt")


def with_a_servers_certificate(authority: Authority, folder: Path) -> ssl.SSLContext:
    (folder / "mine").mkdir()
    return client_context(*issued(authority, folder / "mine", Kind.COORDINATOR, "ash"), folder / "ca.crt")


def of_an_older_tls(authority: Authority, folder: Path) -> ssl.SSLContext:
    context = client_context(*issued(authority, folder, Kind.SITE, "ash"), folder / "ca.crt")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


REFUSALS = {
    outsider: "did not return a certificate",
    of_another_authority: "unable to get local issuer certificate",
    self_issued_by_a_hospital: "invalid CA certificate",
    expired: "certificate has expired",
    with_a_servers_certificate: "unsuitable certificate purpose",
    of_an_older_tls: "unsupported protocol|UNSUPPORTED_PROTOCOL",
}


@pytest.mark.parametrize(("client", "why"), REFUSALS.items(), ids=lambda client: getattr(client, "__name__", ""))
def test_the_server_hangs_up_on_a_client(authority, server, tmp_path, client, why):
    context = client(authority, tmp_path)
    with pytest.raises(ssl.SSLError, match=why):
        shake(server, context)


def test_a_hospital_cannot_pose_as_the_coordinator(authority, tmp_path):
    certificate, key = issued(authority, tmp_path, Kind.SITE, "ash", hosts=["127.0.0.1"])
    posing = server_context(certificate, key, tmp_path / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake(posing, client_context(certificate, key, tmp_path / "ca.crt"))


def test_files_that_do_not_belong_together_are_refused(authority, tmp_path):
    certificate, key = issued(authority, tmp_path, Kind.SITE, "ash")
    new_key(tmp_path / "other.key")
    with pytest.raises(KeyBroken, match="are not an authority, a certificate and its key"):
        client_context(certificate, tmp_path / "other.key", tmp_path / "ca.crt")
    with pytest.raises(KeyBroken, match="are not an authority, a certificate and its key"):
        client_context(certificate, key, tmp_path / "absent.crt")
