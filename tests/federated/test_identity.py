"""Enrolment: keys stay where they were made, names belong to one device, every mix-up is named."""

from __future__ import annotations

import datetime
import os
import shutil
import string
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.identity import (
    Peer,
    check_endpoint,
    check_name,
    create_authority,
    create_identity,
    enroll_here,
    load_identity,
    load_peers,
    read_peer,
    save_peers,
    sign_request,
)


@pytest.fixture
def enrolled(tmp_path):
    """An authority and one device, ant, with its certificate."""
    enroll_here(tmp_path, ["ant"])
    return tmp_path


def refused(code, call, *args, **more):
    with pytest.raises(PeerError, match=code) as e:
        call(*args, **more)
    assert e.value.code == code
    assert e.value.where
    return str(e.value)


def test_a_device_knows_itself_and_is_known(enrolled):
    me, peer = load_identity(enrolled / "ant"), read_peer(enrolled / "authority/issued/ant.pem", "10.0.0.1:7447")
    assert (me.name, peer.name, peer.endpoint) == ("ant", "ant", "10.0.0.1:7447")
    assert me.key.public_key().public_bytes_raw() == peer.key
    assert me.authority == (enrolled / "authority/ca.pem").read_bytes()
    assert "PRIVATE" not in repr(me)
    assert repr(me.key) not in repr(me)


def test_openssl_finds_the_certificate_good(enrolled):
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    for purpose in ("sslserver", "sslclient"):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", enrolled / "authority/ca.pem"]
        subprocess.run([*command, enrolled / "ant/certificate.pem"], check=True, capture_output=True, timeout=20)


def test_private_keys_are_in_three_files_and_only_their_owner_reads_them(enrolled):
    private = {p.relative_to(enrolled).as_posix() for p in enrolled.rglob("*.*") if b"PRIVATE" in p.read_bytes()}
    assert private == {"authority/ca.key", "ant/message.key", "ant/tls.key"}
    assert {(enrolled / p).stat().st_mode & 0o777 for p in private} == {0o600}
    assert {(enrolled / p).parent.stat().st_mode & 0o777 for p in private} == {0o700}


@pytest.mark.skipif(os.name != "posix", reason="modes mean something on POSIX only")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777])
def test_a_private_key_that_others_can_read_is_refused(enrolled, mode):
    for key in ("message.key", "tls.key"):
        (enrolled / "ant" / key).chmod(mode)
        assert f"{mode:04o}" in refused("E651", load_identity, enrolled / "ant")
        (enrolled / "ant" / key).chmod(0o600)
    (enrolled / "authority/ca.key").chmod(mode)
    refused("E651", sign_request, enrolled / "authority", enrolled / "ant/request.pem")
    (enrolled / "ant/message.key").chmod(0o400)
    assert load_identity(enrolled / "ant").name == "ant"


def test_nothing_is_overwritten(enrolled):
    before = {p: p.read_bytes() for p in enrolled.rglob("*.*") if p.is_file()}
    refused("E650", create_authority, enrolled / "authority")
    refused("E650", create_identity, enrolled / "ant", "ant")
    refused("E650", create_identity, enrolled / "ant/tls.key", "ant")
    assert {p: p.read_bytes() for p in enrolled.rglob("*.*") if p.is_file()} == before


def test_a_name_belongs_to_the_device_that_had_it_first(enrolled):
    request = create_identity(enrolled / "impostor", "ant")
    issued = enrolled / "authority/issued/ant.pem"
    first = issued.read_bytes()
    refused("E653", sign_request, enrolled / "authority", request)
    assert issued.read_bytes() == first
    sign_request(enrolled / "authority", enrolled / "ant/request.pem")  # the same device again: a newer certificate
    assert issued.read_bytes() != first
    issued.unlink()
    shutil.copy(sign_request(enrolled / "authority", request), enrolled / "impostor/certificate.pem")
    assert load_identity(enrolled / "impostor").name == "ant"


def test_files_that_do_not_belong_together(enrolled):
    for folder in ("bee", "cat"):
        create_identity(enrolled / folder, "bee")
    shutil.copy(sign_request(enrolled / "authority", enrolled / "bee/request.pem"), enrolled / "bee/certificate.pem")
    shutil.copy(enrolled / "bee/certificate.pem", enrolled / "cat/certificate.pem")
    assert "tls.key" in refused("E653", load_identity, enrolled / "cat")
    shutil.copy(enrolled / "bee/tls.key", enrolled / "cat/tls.key")
    assert "message.key" in refused("E653", load_identity, enrolled / "cat")
    shutil.copy(enrolled / "bee/message.key", enrolled / "cat/message.key")
    assert load_identity(enrolled / "cat").name == "bee"
    shutil.copy(enrolled / "cat/tls.key", enrolled / "cat/message.key")
    assert "Ed25519" in refused("E652", load_identity, enrolled / "cat")
    create_authority(enrolled / "other")
    shutil.copy(enrolled / "other/ca.pem", enrolled / "authority/ca.pem")
    refused("E653", sign_request, enrolled / "authority", enrolled / "bee/request.pem")


def test_a_certificate_of_another_authority(enrolled):
    create_authority(enrolled / "other")
    leaf = (enrolled / "ant/certificate.pem").read_bytes().split(b"-----END CERTIFICATE-----\n")[0]
    mixed = leaf + b"-----END CERTIFICATE-----\n" + (enrolled / "other/ca.pem").read_bytes()
    (enrolled / "ant/certificate.pem").write_bytes(mixed)
    refused("E653", load_identity, enrolled / "ant")
    refused("E653", read_peer, enrolled / "ant/certificate.pem")
    (enrolled / "ant/certificate.pem").write_bytes(leaf + b"-----END CERTIFICATE-----\n")
    refused("E652", load_identity, enrolled / "ant")


def test_a_certificate_holds_for_its_days_and_no_longer_than_the_authority(tmp_path, monkeypatch):
    create_authority(tmp_path / "authority", days=30)
    issued = sign_request(tmp_path / "authority", create_identity(tmp_path / "ant", "ant"), days=10)
    shutil.copy(issued, tmp_path / "ant/certificate.pem")
    longer = sign_request(tmp_path / "authority", create_identity(tmp_path / "bee", "bee"), days=1000)
    ends = [x509.load_pem_x509_certificates(p.read_bytes()) for p in (issued, longer)]
    assert ends[1][0].not_valid_after_utc == ends[1][1].not_valid_after_utc
    now = datetime.datetime.now(datetime.UTC)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return now

    monkeypatch.setattr("contextlora.federated.certificates.datetime.datetime", Clock)
    for days, good in ((-2, False), (-0.5, True), (9.9, True), (10.1, False)):
        now = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
        now = ends[0][0].not_valid_before_utc + datetime.timedelta(days=1 + days)
        if good:
            assert load_identity(tmp_path / "ant").name == "ant"
        else:
            assert "holds from" in refused("E653", load_identity, tmp_path / "ant")


def request(name, *, key=None, uris=None, more=()):
    """A request as someone could write it who does not use `create_identity`."""
    if uris is None:
        uris = ["urn:contextlora:ed25519:" + Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()]
    attributes = [x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, n) for n in name]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(u) for u in uris])
        builder = builder.add_extension(names, critical=False)
    for extension in more:
        builder = builder.add_extension(extension, critical=True)
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (lambda: request(["../../etc"]), "E655"),
        (lambda: request(["a/**"]), "E655"),
        (lambda: request(["ant", "bee"]), "E652"),
        (lambda: request([]), "E652"),
        (lambda: request(["dog"], uris=[]), "E652"),
        (lambda: request(["dog"], uris=["urn:contextlora:ed25519:00"]), "E652"),
        (lambda: request(["dog"], uris=["urn:contextlora:ed25519:" + "0" * 64] * 2), "E652"),
        (lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "E652"),
        (lambda: b"x" * 100_000, "E652"),
        (lambda: b"", "E652"),
    ],
)
def test_requests_that_no_device_makes(enrolled, made, code):
    (enrolled / "request.pem").write_bytes(made())
    refused(code, sign_request, enrolled / "authority", enrolled / "request.pem")
    assert [p.name for p in (enrolled / "authority/issued").iterdir()] == ["ant.pem"]


def test_an_altered_request(enrolled):
    raw = bytearray(x509.load_pem_x509_csr(request(["dog"])).public_bytes(serialization.Encoding.DER))
    raw[-5] ^= 1
    pem = x509.load_der_x509_csr(bytes(raw)).public_bytes(serialization.Encoding.PEM)
    (enrolled / "request.pem").write_bytes(pem)
    refused("E653", sign_request, enrolled / "authority", enrolled / "request.pem")


def test_a_request_gets_no_right_but_its_name(enrolled):
    (enrolled / "request.pem").write_bytes(request(["dog"], more=[x509.BasicConstraints(ca=True, path_length=None)]))
    found = x509.load_pem_x509_certificate(sign_request(enrolled / "authority", enrolled / "request.pem").read_bytes())
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("missing", ["message.key", "tls.key", "certificate.pem"])
def test_missing_and_wrong_files(enrolled, missing):
    file = enrolled / "ant" / missing
    file.write_bytes(b"nonsense")
    refused("E652", load_identity, enrolled / "ant")
    file.unlink()
    assert missing in refused("E652", load_identity, enrolled / "ant")
    file.mkdir()
    refused("E652", load_identity, enrolled / "ant")


# --- names, endpoints, peers.yaml ------------------------------------------------------------------------------------


@given(st.text(string.printable + "é²", max_size=70))
def test_names(name):
    good = 0 < len(name) <= 64 and all(c.isascii() and (c.isalnum() or c in "_-") for c in name)
    if good:
        assert check_name(name) == name
    else:
        with pytest.raises(PeerError, match="E655"):
            check_name(name)


@pytest.mark.parametrize("endpoint", ["10.0.0.1:1", "localhost:65535", "[fe80::1]:7447", "a-b.example:80"])
def test_endpoints(endpoint):
    assert check_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    "endpoint",
    ["", "10.0.0.1", "a:0", "a:65536", "a:1#iface=eth0", "tcp/a:1", "a:1?rel=0", "a b:1", ":1", "fe80::1:1", "a:1\n"],
)
def test_endpoints_that_are_none(endpoint):
    with pytest.raises(PeerError, match="E654"):
        check_endpoint(endpoint)


KEYS = ["0" * 63 + str(i) for i in range(3)]


def test_peers_are_read_as_they_were_written(tmp_path):
    peers = [Peer("12", bytes.fromhex(KEYS[0]), "[::1]:7447"), Peer("true", bytes.fromhex(KEYS[1]))]
    save_peers(tmp_path / "peers.yaml", peers)
    assert load_peers(tmp_path / "peers.yaml") == {p.name: p for p in peers}


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("peers: {ant: {}}", "E654", "ant.key: is missing"),
        ("peers: {ant: {key: 12}}", "E654", "ant.key"),
        (f"peers: {{ant: {{key: '{KEYS[0]}', endpiont: 'a:1'}}}}", "E654", "Did you mean 'endpoint'?"),
        (f"peers: {{ant: {{key: '{KEYS[0]}', endpoint: 'a'}}}}", "E654", "host:port"),
        (f"peers: {{'a/b': {{key: '{KEYS[0]}'}}}}", "E655", "a/b"),
        (f"peers: {{a: {{key: '{KEYS[0]}', endpoint: 'a:1'}}, b: {{key: '{KEYS[0]}'}}}}", "E654", "same key"),
        (f"peers: {{a: {{key: '{KEYS[0]}'}}, b: {{key: '{KEYS[1]}'}}}}", "E654", "cannot meet"),
        ("peers: [", "E654", "YAML"),
    ],
)
def test_peers_that_cannot_be_used(tmp_path, text, code, says):
    (tmp_path / "peers.yaml").write_text(text)
    assert says in refused(code, load_peers, tmp_path / "peers.yaml")


def test_no_list_of_peers(tmp_path):
    refused("E654", load_peers, tmp_path / "peers.yaml")
