"""API keys where they are kept: read at the start, read again on SIGHUP, made by the command."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.access_tokens import TOKEN_PREFIX, AccessTokens
from edge.api_keys import (
    ApiKey,
    ApiKeys,
    BadKeys,
    Holder,
    digest_of,
    line_of,
    parse_keys,
    read_keys,
)
from tests.edge.edge_process import PATIENCE, running_edge
from tests.edge.key_holders import ALICE, BOB, KEYS, SECRET, bearer, hang_up


async def test_hangup_reads_the_keys_again(target: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line_of(KEYS[0]))
    async with running_edge(target, api_keys_file=path) as edge:

        async def statuses() -> list[int]:
            async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http:
                return [
                    (await http.get(f"{edge.url}/v1/models", headers=bearer(key))).status_code
                    for key in (ALICE, BOB)
                ]

        assert await statuses() == [200, 401]
        path.write_text(line_of(KEYS[1]))
        assert (await hang_up(edge))["keys"] == 1
        assert await statuses() == [401, 200]
        for bad in ("nonsense", "", f"{line_of(KEYS[0])} {BOB}"):
            path.write_text(bad)
            line = await hang_up(edge, "api keys not reloaded")
            assert line["level"] == "error"
            assert BOB not in line["reason"]
            assert await statuses() == [401, 200]
        path.unlink()
        await hang_up(edge, "api keys not reloaded")
        assert await statuses() == [401, 200]


async def test_hangup_leaves_tokens_that_the_edge_gave(target: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line_of(KEYS[0]))
    async with (
        running_edge(target, api_keys_file=path) as edge,
        httpx.AsyncClient(base_url=edge.url, trust_env=False, timeout=PATIENCE) as http,
    ):
        given = (await http.post("/v1/tokens", headers=bearer(ALICE))).json()["access_token"]
        for keys, status in (([KEYS[0], KEYS[1]], 200), ([KEYS[1]], 401)):
            path.write_text("\n".join(map(line_of, keys)))
            await hang_up(edge)
            answer = await http.get("/v1/models", params={"access_token": given})
            assert answer.status_code == status


async def test_keys_in_the_environment_and_a_warning_without_any(target: str) -> None:
    lines = "; ".join(map(line_of, KEYS))
    async with running_edge(target, api_keys=lines, host="0.0.0.0") as edge:
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http:
            answer = await http.get(f"{edge.url}/v1/models", headers=bearer(BOB))
        assert answer.status_code == 200
        assert not [line for line in edge.lines if line["level"] == "warning"]
    async with running_edge(target, host="0.0.0.0") as edge:
        await edge.line(lambda line: line["event"].startswith("edge open to everybody"))


def test_keys_that_cannot_be_used_stop_the_start(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")}
    (tmp_path / "short").write_bytes(b"short")
    for arguments, told in (
        ([f"--api-keys-file={tmp_path}/missing"], "cannot read"),
        ([f"--api-keys=alice: {ALICE}"], "line 1: needs sha256:"),
        (
            [f"--api-keys={line_of(KEYS[0])}", f"--token-secret-file={tmp_path}/short"],
            "at least 32 bytes",
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "edge", "--port=0", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("edge: API keys: ")
        assert told in done.stderr
        assert ALICE not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_command_makes_keys_that_are_taken() -> None:
    command = [sys.executable, "-m", "edge.keys"]
    arguments = ["dave", "--weight=0.5", "--max-concurrent=3", "--tokens-per-minute=9000"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    secret, line = (text[6:] for text in done.stdout.splitlines())
    assert secret not in line
    assert len(secret) > 43
    keys = ApiKeys(parse_keys(line))
    holder = keys.find(secret)
    assert holder is not None
    found = holder.key
    assert (found.name, found.weight, found.max_concurrent, found.tokens_per_minute) == (
        *("dave", 0.5, 3, 9000),
    )
    assert keys.find(secret[:-1]) is None
    for wrong in (
        ["a b"],
        ["a", "--weight=0"],
        ["a", "--weight=nan"],
        ["a", "--weight=inf"],
        ["a", "--max-concurrent=0"],
    ):
        failed = subprocess.run([*command, *wrong], capture_output=True, text=True, check=False)
        assert failed.returncode == 2
        assert failed.stdout == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("alice", "line 1: must begin with a name"),
        (f"\nalice sha256:{'0' * 64}", "line 2: must begin with a name"),
        (f"al/ice: sha256:{'0' * 64}", "must begin with a name"),
        (f"alice: sha256:{'0' * 63}", "needs sha256:"),
        (f"alice: sha256:{'0' * 64} weight=-1", "weight must be 0.001 to 1000"),
        (f"alice: sha256:{'0' * 64} weight=0.0009", "weight must be 0.001 to 1000"),
        (f"alice: sha256:{'0' * 64} weight=1 weight=2", "something is given twice"),
        (f"alice: sha256:{'0' * 64} max_concurrent=1.5", "max_concurrent is not a number"),
        (f"alice: sha256:{'0' * 64} disabled=no", "besides hashes"),
        (f"alice: sha256:{'0' * 64} sluice_secret", "besides hashes"),
        (f"alice: sha256:{'0' * 64} sluice_secret sluice_secret", "something is given twice"),
    ],
)
def test_a_bad_line_is_told_by_its_number(text: str, told: str) -> None:
    with pytest.raises(BadKeys, match=told) as refused:
        parse_keys(text)
    assert "sluice_secret" not in str(refused.value)


def test_a_key_may_have_several_hashes_but_no_hash_two_keys() -> None:
    old, new = digest_of("old"), digest_of("new")
    keys = read_keys("", line_of(ApiKey("alice", (old, new))))
    alice = keys.named("alice")
    assert alice is not None
    assert [keys.find("old"), keys.find("new")] == [Holder(alice, old), Holder(alice, new)]
    for other in (ApiKey("bob", (new,)), ApiKey("alice", (digest_of("x"),))):
        with pytest.raises(BadKeys):
            read_keys("", f"{line_of(ApiKey('alice', (old, new)))};{line_of(other)}")


@given(st.text(max_size=80))
def test_no_text_is_a_token_or_breaks_a_line(text: str) -> None:
    tokens = AccessTokens(SECRET, 60)
    assert tokens.find(text, ApiKeys(KEYS)) is None
    assert tokens.find(TOKEN_PREFIX + text, ApiKeys(KEYS)) is None
    for content in (text, f"alice: sha256:{'0' * 64} {text}"):
        try:
            keys = parse_keys(content)
        except BadKeys:
            continue
        assert parse_keys("\n".join(map(line_of, keys))) == keys
