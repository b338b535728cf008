"""The consortium's X.509: its authority, the certificates of coordinator, hospitals and invites, and who lost theirs.

Keys are ECDSA P-256. A certificate says whose it is in one URI, ``cloister:KIND:NAME``, which the authority writes and
nobody else: what a certificate request asks to be called is never read. Names and limits follow RFC 5280.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote, unquote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister_shared import durable
from cloister_shared.errors import EnrolmentRefused, KeyBroken
from cloister_shared.names import site_name

log = logging.getLogger("cloister")

Key = ec.EllipticCurvePrivateKey
"""A private key. To whoever holds one it is opaque; the functions of this module take it."""

EARLY = timedelta(hours=1)
"""By so much a certificate is valid before it was made, for clocks that are slow."""

AUTHORITY_LIFETIME = timedelta(days=3650)

_BROKEN = (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension)
_MOST = 64 * 1024
"""Octets of a certificate or request that are looked at."""


class Kind(StrEnum):
    """Whom a certificate is for. An invite opens the door of enrolment and no other."""

    COORDINATOR = "coordinator"
    SITE = "site"
    INVITE = "invite"


@dataclass(frozen=True)
class Bearer:
    """What a certificate says of who shows it."""

    kind: Kind
    name: str
    serial: int
    not_before: datetime
    not_after: datetime
    public_key: bytes
    """PEM SubjectPublicKeyInfo, as Flower wants it."""


# --- keys --------------------------------------------------------------------------------------------------
def new_key(path: Path) -> Key:
    """Make a key and keep it in a file that its owner alone can read.

    Raises:
        KeyBroken: there is a file already; a key is never replaced unseen.
    """
    if path.exists():
        raise KeyBroken(f"{path} exists.", mend="Use it, or move it away: a new key needs a new certificate.")
    key = made_key()
    durable.save_secret(path, key_pem(key).decode())
    return key


def made_key() -> Key:
    """A key that is in no file: an invite's, which goes straight into the invite."""
    return ec.generate_private_key(ec.SECP256R1())


def read_key(path: Path) -> Key:
    """The key in a file that ``new_key`` wrote.

    Raises:
        KeyBroken: it is missing, damaged, or others on this machine can read it.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise KeyBroken(f"Others on this machine can read {path}.", mend=f"Run chmod 600 {path}.")
        key = load_pem_private_key(path.read_bytes(), password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
            return key
    except OSError as error:
        raise KeyBroken(f"{path} cannot be read: {error.strerror}.", mend="Restore it from a backup.") from None
    except _BROKEN:  # whose text may quote the file: it goes no further
        pass
    raise KeyBroken(f"{path} is no key of the kind that Cloister makes.", mend="Restore it from a backup.")


def public_key(key: Key) -> bytes:
    """Its public half, PEM SubjectPublicKeyInfo."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def key_pem(key: Key) -> bytes:
    """The secret itself, PEM PKCS #8, for gRPC, which wants it in memory."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# --- the authority -----------------------------------------------------------------------------------------
class Authority:
    """The consortium's certificate authority. Its text shows the public half alone."""

    def __init__(self, key: Key, certificate: x509.Certificate) -> None:
        self._key, self._own = key, certificate
        self.certificate: bytes = certificate.public_bytes(Encoding.PEM)

    def __repr__(self) -> str:
        return f"Authority({self._own.subject.rfc4514_string()})"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("The key of an authority does not travel.")

    def issue(self, public_key: bytes, kind: Kind, name: str, lifetime: timedelta, hosts: Sequence[str] = ()) -> bytes:
        """A certificate, PEM, for a key in PEM SubjectPublicKeyInfo. It ends with the authority's own at the latest.

        ``hosts``: names and addresses at which the bearer is reached; a coordinator's alone.

        Raises:
            EnrolmentRefused: the key is of another kind, or a name or host is not one.
        """
        now = datetime.now(UTC)
        server = kind is Kind.COORDINATOR
        try:
            holder = load_pem_public_key(public_key)
            said = [x509.UniformResourceIdentifier(_uri(kind, site_name(name))), *map(_host, hosts)]
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site_name(name))])
        except _BROKEN as error:
            raise EnrolmentRefused(f"No certificate for {name[:80]!r}: {error}.", mend="Correct it.") from None
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        built = (
            _begun(_p256(holder, name), subject, self._own.subject, min(now + lifetime, self._own.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(said), critical=False)
            .add_extension(_identifier(self._own), critical=False)
        )
        return built.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    def crl(self, revoked: Mapping[int, datetime]) -> bytes:
        """The signed list, PEM, of serials and when each was revoked.

        It lies beside the authority that wrote it, and is replaced at every revocation: it names no earlier end than
        the authority's own.
        """
        built = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._own.subject)
            .last_update(datetime.now(UTC) - EARLY)
            .next_update(self._own.not_valid_after_utc)
            .add_extension(_identifier(self._own), critical=False)
            .add_extension(x509.CRLNumber(int(datetime.now(UTC).timestamp() * 1e6)), critical=False)
        )
        for serial, at in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at)
            built = built.add_revoked_certificate(entry.build())
        return built.sign(self._key, SHA256()).public_bytes(Encoding.PEM)


def new_authority(folder: Path, consortium: str) -> Authority:
    """Make ``ca.key`` and ``ca.crt`` in a folder.

    Raises:
        KeyBroken: there are such files already.
        EnrolmentRefused: the consortium's name does not fit the rule for names.
    """
    try:
        called = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site_name(consortium))])
    except ValueError as error:
        raise EnrolmentRefused(f"{consortium[:80]!r}: {error}.", mend="Choose such a name for it.") from None
    if (folder / "ca.crt").exists():
        raise KeyBroken(f"{folder / 'ca.crt'} exists.", mend="A consortium has one authority: choose another folder.")
    key = new_key(folder / "ca.key")
    certificate = (
        _begun(key.public_key(), called, called, datetime.now(UTC) + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, SHA256())
    )
    durable.save_text(folder / "ca.crt", certificate.public_bytes(Encoding.PEM).decode())
    return Authority(key, certificate)


def read_authority(folder: Path) -> Authority:
    """The authority that ``new_authority`` made in this folder.

    Raises:
        KeyBroken: a file is missing or damaged, the key open to others, or not that of the certificate.
    """
    key, path = read_key(folder / "ca.key"), folder / "ca.crt"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        if certificate.public_key() == key.public_key():
            return Authority(key, certificate)
    except (OSError, *_BROKEN):
        pass
    raise KeyBroken(f"{path} is not the certificate of ca.key beside it.", mend="Restore both from the same backup.")


# --- what travels ------------------------------------------------------------------------------------------
def request(key: Key, name: str) -> bytes:
    """A certificate request (PKCS #10, PEM): a public key, signed by its own private half."""
    built = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    return built.sign(key, SHA256()).public_bytes(Encoding.PEM)


def read_request(pem: bytes) -> bytes:
    """The public key of a request, PEM SubjectPublicKeyInfo. What else the request asks for is not looked at.

    Raises:
        EnrolmentRefused: it is damaged, of another kind of key, or whoever made it does not hold the key.
    """
    try:
        if len(pem) <= _MOST and (asked := x509.load_pem_x509_csr(pem)).is_signature_valid:
            return _spki(_p256(asked.public_key(), "the hospital"))
    except _BROKEN:
        pass
    raise EnrolmentRefused("The certificate request is damaged.", mend="Run cloister-site enrol again.")


def bearer(certificate: bytes) -> Bearer:
    """Whose certificate this is, PEM or DER. Its form alone is checked: that the authority signed it, TLS has checked.

    Raises:
        EnrolmentRefused: it is not one of ours by form.
    """
    try:
        if len(certificate) > _MOST:
            raise ValueError("it is too large")
        pem = certificate.lstrip().startswith(b"-----")
        held = x509.load_pem_x509_certificate(certificate) if pem else x509.load_der_x509_certificate(certificate)
        names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        scheme, kind, name = uri.split(":")
        name = unquote(name, errors="strict")
        if scheme != "cloister" or site_name(name) != name or uri != _uri(Kind(kind), name):
            raise ValueError("its name is written in another way")
        public = _spki(_p256(held.public_key(), name))
        dates = held.not_valid_before_utc, held.not_valid_after_utc
        return Bearer(Kind(kind), name, held.serial_number, *dates, public)
    except (*_BROKEN, x509.ExtensionNotFound):
        raise EnrolmentRefused("The certificate is not one of this consortium's.", mend="Enrol again.") from None


# --- revocation --------------------------------------------------------------------------------------------
def revoked(crl: bytes, authority: bytes) -> frozenset[int]:
    """Serials of the certificates that a list revokes.

    Raises:
        EnrolmentRefused: the list is damaged, or this authority (a certificate, PEM) did not sign it.
    """
    try:
        listed, ours = x509.load_pem_x509_crl(crl), x509.load_pem_x509_certificate(authority)
        key = ours.public_key()
        if (
            isinstance(key, ec.EllipticCurvePublicKey)
            and listed.issuer == ours.subject
            and listed.is_signature_valid(key)
        ):
            return frozenset(entry.serial_number for entry in listed)
    except _BROKEN:
        pass
    raise EnrolmentRefused(
        "The revocation list is not signed by the consortium's authority.",
        mend="Start the coordinator again: it writes the list from its records.",
    )


class Revocations:
    """``serial in Revocations(folder)``: whether a certificate is revoked, by ``revoked.crl`` as it is at this moment.

    A list that is missing, damaged or not the authority's revokes everybody: it fails closed.
    """

    def __init__(self, folder: Path) -> None:
        self._crl, self._authority = folder / "revoked.crl", folder / "ca.crt"
        self._read: tuple[object, frozenset[int] | None] = (None, None)

    def __contains__(self, serial: int) -> bool:
        serials = self._serials()
        return serials is None or serial in serials

    def _serials(self) -> frozenset[int] | None:
        try:
            at = self._crl.stat()
            seen = at.st_mtime_ns, at.st_ino, at.st_size
        except OSError:
            seen = "missing"
        if self._read[0] != seen:  # read after the file was looked at: one that is newer is read again
            self._read = seen, self._anew()
        return self._read[1]

    def _anew(self) -> frozenset[int] | None:
        try:
            return revoked(self._crl.read_bytes(), self._authority.read_bytes())
        except (OSError, EnrolmentRefused) as error:
            log.error("%s cannot be used, so every certificate is refused: %s", self._crl, error)
            return None


# --- TLS ---------------------------------------------------------------------------------------------------
def server_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS 1.3 for a server: every client shows a certificate of this authority, no other authority counts.

    Raises:
        KeyBroken: a file is missing or damaged, or the key is not that of the certificate.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, authority)
    context.num_tickets = 0  # a resumed session would outlive the certificate that opened it
    return context


def client_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS 1.3 for a client: the server shows a certificate of this authority for the host that was called.

    Raises:
        KeyBroken: a file is missing or damaged, or the key is not that of the certificate.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, authority)


def _context(protocol: int, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    read_key(key)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError):
        raise KeyBroken(
            f"{authority}, {certificate} and {key.name} are not an authority, a certificate and its key.",
            mend="Restore them from the same backup, or enrol again.",
        ) from None
    return context


# --- the parts of a certificate ----------------------------------------------------------------------------
def _begun(
    holder: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(holder)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - EARLY)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(holder), critical=False)
    )


def _usage(*, signature: bool = False, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signature,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _uri(kind: Kind, name: str) -> str:
    return f"cloister:{kind}:{quote(name, safe='')}"


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _p256(key: object, whose: str) -> ec.EllipticCurvePublicKey:
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise EnrolmentRefused(f"The key of {whose} is not ECDSA P-256.", mend="Make it with cloister-site enrol.")


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
