"""The configuration is strict, its precedence as promised, and it mixes no pool's secrets."""

import sys
from pathlib import Path

import pytest

from cbtfs import config, errors, password, tables
from cbtfs.sample import Sample
from cbtfs.tables import JobTable

EXAMPLE = """
[pool.prod]
url = "https://xcp1.example.org"
user = "backup"
password_file = "prod.password"
ca_file = "prod.pem"
connections_per_host = 12

[store.main]
path = "/srv/backup"

[job.nightly]
pool = "prod"
store = "main"
vms = ["web*", "tag:gold"]
exclude_disks = ["*scratch*"]
keep = { last = 3, daily = 7, weekly = 4, monthly = 12 }
limit_rate = "200M"
verify_sample = "0.1%"
hooks = { after = ["/usr/local/bin/notify"], failed = ["/usr/local/bin/page"] }
"""


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "cbtfs.toml"
    path.write_text(text)
    return config.load(path)


def ignore(_: str) -> None:
    """Take a warning and say nothing."""


# ── The file ──


def test_example_of_the_readme_is_valid(tmp_path: Path) -> None:
    found = load(tmp_path, EXAMPLE)

    assert found.pools["prod"].user == "backup"
    assert found.stores["main"].path == "/srv/backup"
    assert found.jobs["nightly"].vms == ("web*", "tag:gold")


def test_no_file_is_an_empty_configuration() -> None:
    assert config.load(None) == config.Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[pool.prod]\nurll = "x"', "pool.prod.urll: unknown key, did you mean 'url'?"),
        ('[pol.prod]\nurl = "x"', "pol: unknown key, did you mean 'pool'?"),
        ('[store.main]\nzzz = "x"', "store.main.zzz: unknown key, known are: path"),
        ("[job.a]\nkeep = { dayly = 7 }", "job.a.keep.dayly: unknown key, did you mean 'daily'?"),
        ("[store.main]\npath = 5", "store.main.path: Expected `str`, got `int`"),
        ("[store.main]", "store.main: Object missing required field `path`"),
        ("[pool.p]\nurl='https://h'\nconnections_per_host=17", "pool.p.connections_per_host: "),
        ("store = 5", "store: write [store.NAME], with a name of your choice"),
        ("[pool]\nurl = 'https://h'", "pool.url: write it below [pool.NAME]"),
        ("[pool.p]\nurl = 'http://h'", "pool.p.url: 'http://h' is no url of a host"),
        ("[pool.p]\nurl = 'https://u:p@h'", "pool.p.url: a url holds no user or password"),
        ("[pool.p]\nurl = 'https://h:x'", "pool.p.url: 'https://h:x' is no url"),
        ("[pool.p]\nurl = 'https://u:p@h:x'", "pool.p.url: a url holds no user or password"),
        ("[pool.p]\nurl = 'https://u:[p@h'", "pool.p.url: a url holds no user or password"),
        ("[pool.p]\nurl='https://h'\nfingerprint='ab'", "pool.p.fingerprint: fingerprint 'ab' is"),
        ('[pool.p]\nurl="https://h"\nfingerprint="\'"', "pool.p.fingerprint: No closing quot"),
        ('[pool.p]\nurl="https://h"\npassword_command="\'"', "pool.p.password_command: No clos"),
        ("[job.n]\npool = 'prd'\n[pool.prod]\nurl='https://h'", "did you mean 'prod'?"),
        ("[job.n]\nlimit_rate = 'fast'", "job.n.limit_rate: 'fast' is not a rate"),
        ("[job.n]\nlimit_rate = '200'", "job.n.limit_rate: '200' is 200 B/s, less than one block"),
        (
            "[job.n]\nlimit_rate = 200",
            "job.n.limit_rate: 200 has no unit; write for example '200M'",
        ),
        ("[job.n]\nverify_sample = '2'", "job.n.verify_sample: '2' is not a percentage"),
        ("[job.n]\nverify_sample = 0.1", "job.n.verify_sample: 0.1 has no unit; write for ex"),
        ("[job.n]\nverify_sample = '101%'", "is not a percentage; write for example 0.1%"),
        ("[job.n]\nverify_sample = 'nan%'", "is not a percentage; write for example 0.1%"),
        ("[pool.p", "not TOML: "),
        (
            "[pool.p]\nurl='https://h'\npassword_file='a'\npassword_command='b'",
            "pool.p: give password_file or password_command, not both",
        ),
    ],
)
def test_mistake_is_named_with_its_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        load(tmp_path, text)

    assert str(caught.value).startswith(f"{tmp_path}/cbtfs.toml: ")
    assert message in str(caught.value)


def test_unreadable_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        config.load(tmp_path)


def test_keys_without_effect_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "prod.password").touch()
    (tmp_path / "prod.pem").touch()

    [warning] = config.warnings(load(tmp_path, EXAMPLE))

    assert "job.nightly: hooks have no effect" in warning


def test_retention_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"job\.j\.keep: it keeps nothing"):
        load(tmp_path, '[job.j]\nvms = ["a"]\nkeep = { last = 0 }\n')


def test_a_job_limits_its_rate(tmp_path: Path) -> None:
    found = load(tmp_path, EXAMPLE)

    assert config.rate_of(found.jobs["nightly"]) == 200 << 20
    assert config.rate_of(JobTable()) == 0


@pytest.mark.parametrize(
    ("text", "sample"),
    [
        ("", Sample()),
        ("0.1%", Sample(share=0.001, at_most=None)),
        ("100%", Sample(share=1, at_most=None)),
        ("0%", Sample(share=0, at_most=None)),
    ],
)
def test_a_job_says_how_much_is_sampled(text: str, sample: Sample) -> None:
    assert config.sample_of(JobTable(verify_sample=text)) == sample


def test_a_sample_of_nothing_reads_nothing() -> None:
    assert config.sample_of(JobTable(verify_sample="0%")).count(1000) == 0


def test_missing_secret_and_ca_files_are_warned_of(tmp_path: Path) -> None:
    found = config.warnings(load(tmp_path, EXAMPLE))

    assert any("pool.prod.password_file: there is no file" in sentence for sentence in found)
    assert any("pool.prod.ca_file: there is no file" in sentence for sentence in found)


def test_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"no such file \(--config\)"):
        config.find(str(tmp_path / "none"), {})
    with pytest.raises(errors.ConfigError, match=r"no such file \(CBTFS_CONFIG\)"):
        config.find(None, {"CBTFS_CONFIG": str(tmp_path / "none")})


def test_option_names_the_file_before_the_environment(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()

    found = config.find(str(tmp_path / "a"), {"CBTFS_CONFIG": str(tmp_path / "b")})

    assert found == tmp_path / "a"


# ── Choosing ──


def test_only_pool_needs_no_name(tmp_path: Path) -> None:
    chosen = config.choose_pool(load(tmp_path, EXAMPLE), None, environ={})

    assert chosen.name == "prod"
    assert chosen.table.password_file == str(tmp_path / "prod.password")


def test_environment_changes_single_settings_of_the_file(tmp_path: Path) -> None:
    environ = {"CBTFS_USER": "other", "CBTFS_FINGERPRINT": "sha256:ab"}

    chosen = config.choose_pool(load(tmp_path, EXAMPLE), None, environ=environ)

    assert chosen.table.user == "other"
    assert chosen.table.fingerprint == ("sha256:ab",)
    assert chosen.table.ca_file == ""


def test_pool_of_the_environment_takes_nothing_from_the_file(tmp_path: Path) -> None:
    environ = {"CBTFS_URL": "https://elsewhere"}

    chosen = config.choose_pool(load(tmp_path, EXAMPLE), None, environ=environ)

    assert (chosen.name, chosen.table.url) == ("env", "https://elsewhere")
    assert (chosen.table.password_file, chosen.table.ca_file) == ("", "")


def test_chosen_pool_takes_nothing_from_the_pool_of_the_environment(tmp_path: Path) -> None:
    environ = {"CBTFS_URL": "https://elsewhere", "CBTFS_PASSWORD_FILE": "/secret"}

    chosen = config.choose_pool(load(tmp_path, EXAMPLE), "prod", environ=environ)

    assert chosen.table.url == "https://xcp1.example.org"
    assert chosen.table.password_file == str(tmp_path / "prod.password")


def test_unknown_pool_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match="did you mean 'prod'"):
        config.choose_pool(load(tmp_path, EXAMPLE), "prd", environ={})


def test_no_pool_anywhere_says_how_to_name_one() -> None:
    with pytest.raises(errors.UsageError, match="set CBTFS_URL"):
        config.choose_pool(config.Config(), None, environ={})


def test_several_pools_want_a_choice(tmp_path: Path) -> None:
    found = load(tmp_path, "[pool.a]\nurl='https://a'\n[pool.b]\nurl='https://b'")

    with pytest.raises(errors.UsageError, match="choose with --pool: a, b"):
        config.choose_pool(found, None, environ={})


def test_store_is_a_name_or_a_directory(tmp_path: Path) -> None:
    found = load(tmp_path, EXAMPLE)

    assert config.choose_store(found, "main", environ={}) == Path("/srv/backup")
    assert config.choose_store(found, None, environ={}) == Path("/srv/backup")
    assert config.choose_store(found, str(tmp_path), environ={}) == tmp_path
    assert config.choose_store(config.Config(), None, environ={}) is None


def test_store_of_the_environment_comes_before_the_file(tmp_path: Path) -> None:
    found = config.choose_store(
        load(tmp_path, EXAMPLE), None, environ={"CBTFS_STORE": "/mnt/other"}
    )

    assert found == Path("/mnt/other")


def test_store_that_is_neither_name_nor_directory_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match="a directory is written with a slash"):
        config.choose_store(load(tmp_path, EXAMPLE), "mian-store-9", environ={})


def test_unknown_job_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="did you mean 'nightly'"):
        config.choose_job(load(tmp_path, EXAMPLE), "nightli")


# ── Passwords ──


def test_password_file_loses_only_its_newline(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(" with spaces \n")
    file.chmod(0o600)

    assert password.read(password.Source("p", file=str(file)), warn=ignore) == " with spaces "


def test_password_readable_by_everybody_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("x")
    file.chmod(0o644)
    said: list[str] = []

    password.read(password.Source("p", file=str(file)), warn=said.append)

    assert said == [f"{file} is readable by everybody; protect the password with: chmod 600 {file}"]


def test_password_command_prints_the_password() -> None:
    command = (sys.executable, "-c", "print('hunter2')")

    assert password.read(password.Source("p", command=command), warn=ignore) == "hunter2"


def test_failing_password_command_tells_what_it_said() -> None:
    command = (sys.executable, "-c", "raise SystemExit('vault is sealed')")

    with pytest.raises(errors.ConfigError, match="exit status 1: vault is sealed"):
        password.read(password.Source("p", command=command), warn=ignore)


def test_missing_password_command_is_a_configuration_error() -> None:
    with pytest.raises(errors.ConfigError, match="cannot be run"):
        password.read(password.Source("p", command=("/no/such/program",)), warn=ignore)


def test_credentials_of_systemd_are_found_by_pool_name(tmp_path: Path) -> None:
    (tmp_path / "cbtfs.password").write_text("general")
    (tmp_path / "prod.password").write_text("own")

    def read(name: str) -> str:
        return password.read(
            password.Source(name, credentials_directory=str(tmp_path)), warn=ignore
        )

    assert (read("prod"), read("other")) == ("own", "general")


def test_no_password_anywhere_says_where_to_put_it() -> None:
    with pytest.raises(errors.ConfigError, match="password_file"):
        password.read(password.Source("p"), warn=ignore)


def test_empty_password_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("\n")

    with pytest.raises(errors.ConfigError, match="is empty"):
        password.read(password.Source("p", file=str(tmp_path / "secret")), warn=ignore)


def test_options_carry_the_password_but_do_not_show_it(tmp_path: Path) -> None:
    (tmp_path / "prod.password").write_text("hunter2")
    chosen = config.choose_pool(load(tmp_path, EXAMPLE), None, environ={})

    options = config.pool_options(chosen, environ={}, warn=ignore)

    assert options.password == "hunter2"
    assert "hunter2" not in repr(options)


def test_unbalanced_quotes_in_a_command_are_a_configuration_error() -> None:
    table = tables.PoolTable(url="https://h", password_command="pass 'x")

    with pytest.raises(errors.ConfigError, match="password_command: No closing quotation"):
        config.pool_options(config.ChosenPool("p", table), environ={}, warn=ignore)


def test_pool_trusted_otherwise_keeps_its_state_elsewhere() -> None:
    one = config.ChosenPool("p", tables.PoolTable(url="https://h", ca_file="/a"))
    two = config.ChosenPool("p", tables.PoolTable(url="https://h", ca_file="/b"))

    assert config.state_dir(one, environ={}) != config.state_dir(two, environ={})


def test_state_is_kept_where_systemd_says(tmp_path: Path) -> None:
    chosen = config.ChosenPool("p", tables.PoolTable(url="https://h"))

    found = config.state_dir(chosen, environ={"STATE_DIRECTORY": f"{tmp_path}:/other"})

    assert found.parent == tmp_path / "pools"


@pytest.mark.parametrize("key", ["password_file", "ca_file"])
def test_home_of_nobody_is_a_configuration_error(tmp_path: Path, key: str) -> None:
    found = load(tmp_path, f"[pool.a]\nurl='https://a'\n{key}='~nobody-at-all/x'")

    for use in (
        lambda: config.warnings(found),
        lambda: config.choose_pool(found, "a", environ={}),
        lambda: config.choose_store(found, "~nobody-at-all/x", environ={}),
    ):
        with pytest.raises(errors.ConfigError, match="there is no such user"):
            use()
