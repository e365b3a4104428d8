"""The secret of a run: for its ranks, and for nobody else; what is public cannot be forged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from lightning_stale.transport import invitation, secret
from lightning_stale.transport.credentials import Credentials, ForgedError
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.introduction import Introduction, ServerUnavailableError
from lightning_stale.transport.invitation import Invitation, NotInvitedError
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.secret import SecretError, SecretFile

LAYOUT = Layout.of([torch.zeros(2, 3), torch.zeros(4, 5).t(), torch.zeros(())])
PLAIN_LAYOUT = json.loads(json.dumps(LAYOUT.to_message()))  # as it arrives
ENDPOINT = Endpoint(address="tcp://127.0.0.1:5555", host_id="host", pid=7, layout=PLAIN_LAYOUT)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv(secret.VARIABLE, raising=False)
    return tmp_path / f"lightning-stale-{os.geteuid()}"


def introduce(store: HashStore, rank: int, run: str = "run") -> Introduction:
    return Introduction(store, run, rank, others=1)


# --- keys ---------------------------------------------------------------------------------------------------------


def test_all_ranks_derive_the_same_keys_and_every_run_and_secret_has_others() -> None:
    same = [Credentials.derive("s" * 32, "run") for _ in range(2)]
    assert same[0] == same[1]
    keys = {
        key
        for given, run in (("s" * 32, "run"), ("s" * 32, "other"), ("t" * 32, "run"))
        for pair in (Credentials.derive(given, run).server, Credentials.derive(given, run).worker)
        for key in (pair.public, pair.secret)
    }
    assert len(keys) == 12
    assert all(len(key) == 40 and key.isprintable() for key in keys)
    assert same[0].worker.secret not in repr(same[0])


def test_an_endpoint_travels_as_sealed_text() -> None:
    credentials = Credentials.derive("s" * 32, "run")
    text = ENDPOINT.encode(credentials)
    again = Endpoint.decode(text, credentials)
    assert again == ENDPOINT
    assert Layout.from_message(again.layout) == LAYOUT
    for forged in (text.replace("5555", "6666"), text[1:], "", "{}"):
        with pytest.raises(ForgedError):
            Endpoint.decode(forged, credentials)
    with pytest.raises(ForgedError):
        Endpoint.decode(text, Credentials.derive("s" * 32, "another run"))


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_file_is_this_users_alone_and_gone_afterwards(folder: Path) -> None:
    file = SecretFile()
    (path,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert secret.read(file.name) == file.secret == path.read_text()
    assert len(file.secret) == 64
    file.remove()
    assert list(folder.iterdir()) == []


def test_forgotten_files_are_removed(folder: Path) -> None:
    SecretFile()
    (old,) = folder.iterdir()
    os.utime(old, (0, 0))
    SecretFile()
    (new,) = folder.iterdir()
    assert new != old


def test_a_folder_that_others_can_enter_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(SecretError, match=r"is not this user's alone \(owner \d+, mode drwxr-xr-x\)") as error:
        SecretFile()
    assert "remove it, or give all ranks the same secret" in str(error.value)


@pytest.mark.parametrize("planted", ["a link", "a file of others", "a link as folder"])
def test_what_somebody_has_planted_is_refused(planted: str, folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    name = "0" * 32
    if planted == "a link as folder":
        folder.symlink_to(elsewhere)
        (elsewhere / name).write_text("known")
    else:
        folder.mkdir(mode=0o700)
        target = elsewhere / "known"
        target.write_text("known")
        if planted == "a link":
            target.chmod(0o600)
            (folder / name).symlink_to(target)
        else:
            target.rename(folder / name)
            (folder / name).chmod(0o644)
    with pytest.raises(SecretError):
        secret.read(name)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname", "", "0" * 31, "0" * 31 + "\n"])
def test_a_name_leads_nowhere_else(name: str) -> None:
    with pytest.raises(SecretError, match="is not the name of a secret"):
        secret.read(name)


def test_a_rank_that_does_not_see_the_file_is_told_what_to_do() -> None:
    with pytest.raises(SecretError, match=r"cannot read it \(No such file.*export LIGHTNING_STALE_SECRET="):
        secret.read("0" * 32)


# --- the environment ----------------------------------------------------------------------------------------------


def test_several_hosts_need_a_secret_from_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    secret.check(num_nodes=1)
    with pytest.raises(SecretError, match=r"the ranks of 2 hosts .* export LIGHTNING_STALE_SECRET="):
        secret.check(num_nodes=2)
    monkeypatch.setenv(secret.VARIABLE, "x" * 32)
    secret.check(num_nodes=2)
    monkeypatch.setenv(secret.VARIABLE, "letmein")
    with pytest.raises(SecretError, match="has 7 characters, and can be guessed"):
        secret.check(num_nodes=1)


def test_a_secret_from_the_user_needs_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(secret.VARIABLE, "x" * 32)
    store = HashStore()
    offered = introduce(store, 0).offer(lambda _: ENDPOINT)
    assert not folder.exists()
    assert introduce(store, 1).accept() == offered
    monkeypatch.delenv(secret.VARIABLE)
    with pytest.raises(SecretError, match="rank 0 has a LIGHTNING_STALE_SECRET and rank 1 has none"):
        introduce(store, 1).accept()
    monkeypatch.setenv(secret.VARIABLE, "y" * 32)
    with pytest.raises(SecretError, match="rank 1 does not have the secret of rank 0"):
        introduce(store, 1).accept()


# --- the introduction ---------------------------------------------------------------------------------------------


def test_the_store_learns_no_secret(folder: Path) -> None:
    store = HashStore()
    first = introduce(store, 0)
    endpoint, credentials = first.offer(lambda _: ENDPOINT)
    assert introduce(store, 1).accept() == (endpoint, credentials)
    told = store.get("lightning_stale/run").decode()
    (path,) = folder.iterdir()
    for hidden in (path.read_text(), credentials.worker.secret, credentials.server.secret, credentials.seal_key.hex()):
        assert hidden not in told
    first.close()
    assert list(folder.iterdir()) == []


def test_where_all_is_open_anyway_nobody_needs_a_secret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()

    def on_host(rank: int) -> Introduction:
        return Introduction(store, "run", rank, others=1, open_to_all=True)

    offered = on_host(0).offer(lambda _: ENDPOINT)
    assert on_host(1).accept() == offered
    assert not folder.exists()
    with pytest.raises(SecretError, match="rank 0 has a LIGHTNING_STALE_SECRET and rank 1 has none"):
        introduce(store, 1).accept()
    monkeypatch.setenv(secret.VARIABLE, "x" * 32)  # who has one is closed to all others
    closed = on_host(0).offer(lambda _: ENDPOINT)
    assert closed[1] != offered[1]
    assert on_host(1).accept() == closed
    monkeypatch.delenv(secret.VARIABLE)
    with pytest.raises(SecretError, match="rank 1 does not have the secret of rank 0"):
        on_host(1).accept()


def test_what_somebody_else_writes_into_the_store_is_refused() -> None:
    store = HashStore()
    introduce(store, 0).offer(lambda _: ENDPOINT)
    name, _, sealed = store.get("lightning_stale/run").decode()[1:].partition("\n")
    attacker = Credentials.derive("known to the attacker", "run")
    for forged in (f"+{name}\n{ENDPOINT.encode(attacker)}", f"+{name}\n{sealed.replace('5555', '6666')}", f"+{name}"):
        store.set("lightning_stale/run", forged)
        with pytest.raises(SecretError, match="somebody else has told it"):
            introduce(store, 1).accept()


def test_the_others_learn_that_rank_0_has_failed(folder: Path) -> None:
    def fail(_: Credentials) -> Endpoint:
        raise OSError("no memory")

    store = HashStore()
    first = introduce(store, 0)
    with pytest.raises(OSError, match="no memory"):
        first.offer(fail)
    with pytest.raises(ServerUnavailableError, match="rank 0 could not start the parameter server: OSError: no memory"):
        introduce(store, 1).accept()
    first.close()
    assert list(folder.iterdir()) == []


# --- a file that stays, and one that the user names -------------------------------------------------------------------


def test_the_file_of_a_run_that_goes_on_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    file, dead = secret.SecretFile("x" * 64), secret.SecretFile()
    dead._file.close()  # as if its process had been killed
    for one in (file, dead):
        os.utime(one.path, (0, 0))
    secret.SecretFile().remove()
    assert file.path.read_text() == "x" * 64
    assert not dead.path.exists()
    assert secret.read_from(file.path) == "x" * 64
    file.remove()
    assert not file.path.exists()


def test_a_secret_that_the_user_names_is_checked(tmp_path: Path) -> None:
    with pytest.raises(secret.SecretError, match=r"nobody cannot be read .* name the file that rank 0 has printed"):
        secret.read_from(tmp_path / "nobody")
    file = tmp_path / "secret"
    file.touch(mode=0o600)
    with pytest.raises(secret.SecretError, match="has 0 characters"):
        secret.read_from(file)
    file.write_text("x" * 64)
    file.chmod(0o640)
    with pytest.raises(secret.SecretError, match=f"mode -rw-r-----.: run chmod 600 {file}"):
        secret.read_from(file)


def test_a_run_that_is_not_elastic_is_not_joined() -> None:
    store = HashStore()
    with pytest.raises(NotInvitedError, match=r"StaleSyncStrategy\(elastic=True\)"):
        Invitation.read(store)
    Invitation("run", "7").post(store)
    assert Invitation.read(store) == Invitation("run", "7")
    invitation.withdraw(store)
    with pytest.raises(NotInvitedError):
        Invitation.read(store)
    with pytest.raises(NotInvitedError, match=r"no run can be reached at 127.0.0.1:1 "):
        invitation.connect("127.0.0.1", 1)
