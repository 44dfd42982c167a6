//! The table of broken configurations, and the documented example held to the defaults.

use std::path::{Path, PathBuf};
use std::time::Duration;

use polykey_hsm::{MasterKeySource, PassphraseParams, SecretSource};

use super::*;

const BASE: &str = r#"[node]
data_dir = "d"
[listen]
certificate = "s.pem"
key = "s.key"
client_ca = "ca.pem"
[master_key]
source = { file = "m.key" }
"#;

/// Stands wherever a careless hand might put a secret; must never come back in an error.
const CANARY: &str = "CANARY-hunter2-Zm9vYmFy";

fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(Path::new("/etc/polykey/polykey.toml"), text)
}

/// [`BASE`] with `text` in the place of one line, or after its last for 9.
fn edited(line: usize, text: &str) -> String {
    let mut lines: Vec<&str> = BASE.lines().collect();
    if line > lines.len() {
        lines.push(text);
    } else {
        lines[line - 1] = text;
    }
    lines.join("\n")
}

/// (line replaced or 9 to append, its new text, place, what, remedy)
type Case = (usize, &'static str, &'static str, &'static str, &'static str);

#[rustfmt::skip]
const BROKEN: &[Case] = &[
    // The text as such.
    (9, "[audit", "9:7", "not TOML", "toml.io"),
    (9, "= 3", "9:1", "not TOML", "toml.io"),
    (9, "[log]\nlevel = info", "10:9", "not TOML", "toml.io"),
    (9, "[log]\nlevel = \"info", "10:14", "not TOML", "toml.io"),
    (9, "[log]\nlevel = \"info\"\nlevel = \"warn\"", "11:1", "not TOML", "toml.io"),
    (9, "[node]", "9:2", "not TOML", "toml.io"),
    (9, "[log]\nlevel = \"a\\qb\"", "10:12", "not TOML", "toml.io"),
    // Names.
    (9, "[nodes]\na = 1", "9:2", "`nodes` is not a section", "did you mean `node`?"),
    (9, "[observability]", "9:2", "`observability` is not a section", "remove it; sections are: anchor"),
    (9, "[Log]", "9:2", "this key is not a section", "sections are"),
    (2, "data_dir = \"d\"\nname = \"n\"", "3:1", "`name` is not an option", "options are: data_dir"),
    (2, "data-dir = \"d\"", "2:1", "`data-dir` is not an option", "did you mean `data_dir`?"),
    (6, "client_ca = \"c\"\nmax_conections = 3", "7:1", "[listen]: `max_conections`", "did you mean `max_connections`?"),
    (9, "[tokens]\nissuer = \"x\"", "10:1", "[tokens]: `issuer`", "options are: access_ttl, refresh_ttl"),
    (9, "node2 = 1", "9:1", "[master_key]: this key is not an option", "options are"),
    (9, "[audit]\ndata_plan = \"durable\"", "10:1", "`data_plan` is not", "did you mean `data_plane`?"),
    (9, "[storage]\nurl = \"postgres://u:CANARY-hunter2-Zm9vYmFy@h/db\"", "10:1", "`url` is not", "options are"),
    (9, "key = \"CANARY-hunter2-Zm9vYmFy\"", "9:1", "[master_key]: `key` is not", "options are: argon2, kind, passphrase, source"),
    (9, "CANARY-hunter2-Zm9vYmFy = 1", "9:1", "this key is not an option", "remove it"),
    // What must stand.
    (2, "", "1:2", "[node] data_dir: missing", "add `data_dir = \"/var/lib/polykey\"` to [node]"),
    (4, "", "3:2", "[listen] certificate: missing", "add `certificate ="),
    (5, "", "3:2", "[listen] key: missing", "add `key ="),
    (6, "", "3:2", "[listen] client_ca: missing", "add `client_ca ="),
    (8, "", "7:2", "[master_key] source: missing", "add `source = { file = \"master.key\" }`"),
    (7, "[limits]", "1:1", "[master_key] source: missing", "to [master_key]"),
    (9, "[ca]\nkey = \"k\"", "9:2", "[ca] certificate: missing", "add `certificate ="),
    (9, "[ca]\ncertificate = \"c\"", "9:2", "[ca] key: missing", "add `key ="),
    (9, "[ca]", "9:2", "[ca] certificate: missing", "add `certificate ="),
    // Kinds of values.
    (1, "node = 3\n[other]", "1:8", "`node` is a integer, not a section", "write a section [node]"),
    (2, "data_dir = 3", "2:12", "[node] data_dir: a integer, not text", "write it in quotes"),
    (2, "data_dir = \"\"", "2:12", "[node] data_dir: empty", "write a value"),
    (2, "data_dir = \"a\\u0000b\"", "2:12", "NUL", "remove it"),
    (4, "certificate = [\"a\"]", "4:15", "[listen] certificate: a array", "in quotes"),
    (9, "[listen.tls]\na = 1", "9:9", "[listen]: `tls` is not", "options are"),
    (9, "[policies]\nfiles = \"a.cedar\"", "10:9", "[policies] files: a string, not a list", "write a list"),
    (9, "[policies]\nfiles = [1]", "10:9", "[policies] files: a integer", "in quotes"),
    (9, "[policies]\nfiles = [\"a\", \"a\"]", "10:9", "stands in it twice", "once"),
    (9, "[runtime]\nlock_memory = \"yes\"", "10:15", "[runtime] lock_memory: a string", "true or false"),
    // Addresses.
    (3, "[listen]\naddress = \"localhost:1\"", "4:11", "[listen] address: not an address", "write an IP address and a port"),
    (3, "[listen]\naddress = \"127.0.0.1\"", "4:11", "not an address with a port", "127.0.0.1:50053"),
    (3, "[listen]\naddress = \"127.0.0.1:70000\"", "4:11", "not an address with a port", "[::]:50053"),
    (3, "[listen]\naddress = 50053", "4:11", "a integer, not text", "in quotes"),
    (3, "[listen]\nhealth = \"0.0.0.0:8080\"", "4:10", "must be on loopback", "127.0.0.1 or [::1]"),
    (3, "[listen]\nhealth = \"10.0.0.1:8080\"", "4:10", "must be on loopback", "127.0.0.1 or [::1]"),
    (3, "[listen]\nhealth = \"127.0.0.1:50053\"", "4:10", "[listen] health: the same as `address`", "another port"),
    (3, "[listen]\nmetrics = \"192.168.1.1:9464\"", "4:11", "must be on loopback", "127.0.0.1 or [::1]"),
    (3, "[listen]\nhealth = \"127.0.0.1:1\"\nmetrics = \"127.0.0.1:1\"", "5:11", "[listen] metrics: the same as `health`", "another port"),
    // Whom it tells.
    (9, "[webhooks.a]", "9:11", "[webhooks.a] url: missing", "add `url ="),
    (9, "[webhooks.a]\nurl = \"https://h/\"", "9:11", "[webhooks.a] secret: missing", "{ file ="),
    (9, "[webhooks.a]\nurl = \"ftp://h/\"", "10:7", "not the address of a receiver", "https://HOST"),
    (9, "[webhooks.a]\nurl = \"http://h.example/\"", "10:7", "in the clear", "https://HOST"),
    (9, "[webhooks.a]\nurl = \"https://u:CANARY-hunter2-Zm9vYmFy@h/\"", "10:7", "not the address of a receiver", "`headers`"),
    (9, "[webhooks.a]\nurl = \"http://[::1]/\"\nca = \"c\"", "11:6", "the receiver has no TLS", "https://"),
    (9, "[webhooks.a]\nevents = []", "10:10", "empty", "remove the section"),
    (9, "[webhooks.a]\nevents = [\"key.made\"]", "10:10", "not one of its words", "\"key.rotated\""),
    (9, "[webhooks.a]\nevents = [\"key.expired\", \"key.expired\"]", "10:10", "twice", "\"key.rotated\""),
    (9, "[webhooks.a]\nheaders = { webhook-id = { env = \"X\" } }", "10:11", "not the name of a header", "lower case"),
    (9, "[webhooks.a]\nsecret = \"CANARY-hunter2-Zm9vYmFy\"", "10:10", "a string where a reference", "{ file ="),
    (9, "[webhooks.\"a b\"]\nurl = \"https://h/\"\nsecret = { env = \"X\" }", "9:11", "none of a webhook", "1 to 64"),
    // Where telemetry goes.
    (9, "[telemetry]", "9:2", "[telemetry] endpoint: missing", "add `endpoint ="),
    (9, "[telemetry]\nendpoint = \"collector:4317\"", "10:12", "not an address of a collector", "https://HOST:PORT"),
    (9, "[telemetry]\nendpoint = \"https://u:CANARY-hunter2-Zm9vYmFy@h:1\"", "10:12", "not an address of a collector", "[telemetry.headers]"),
    (9, "[telemetry]\nendpoint = \"https://h:1/otlp\"", "10:12", "OTLP/gRPC has no path", "protocol = \"http\""),
    (9, "[telemetry]\nendpoint = \"http://h:1\"\nca = \"c\"", "11:6", "the endpoint has no TLS", "https://"),
    (9, "[telemetry]\nendpoint = \"http://h:1\"\nheaders = { a = { env = \"X\" } }", "11:11", "in the clear", "https://"),
    (9, "[telemetry]\nendpoint = \"https://h:1\"\nheaders = { te = { env = \"X\" } }", "11:11", "not the name of a header", "lower case"),
    (9, "[telemetry]\nendpoint = \"https://h:1\"\nheaders = { a = \"CANARY-hunter2-Zm9vYmFy\" }", "11:11", "a string where a reference", "{ file ="),
    (9, "[telemetry]\nendpoint = \"https://h:1\"\nsample = 1.5", "11:10", "out of range", "from 0 to 1"),
    (9, "[telemetry]\nendpoint = \"https://h:1\"\nsample = \"all\"", "11:10", "a string, not a number", "0.05"),
    (9, "[telemetry]\nendpoint = \"https://h:1\"\nsignals = [\"spans\"]", "11:11", "not one of its words", "\"traces\""),
    (9, "[telemetry]\nendpoint = \"https://h:1\"\nsignals = []", "11:11", "empty", "remove the section"),
    // Numbers.
    (3, "[listen]\nmax_connections = 0", "4:19", "[listen] max_connections: out of range", "from 1 to 1000000"),
    (3, "[listen]\nmax_connections = -1", "4:19", "out of range", "from 1 to 1000000"),
    (3, "[listen]\nmax_connections = 99999999999999999999", "4:19", "out of range", "from 1 to"),
    (3, "[listen]\nmax_connections = 1.5", "4:19", "a float, not a whole number", "whole number"),
    (3, "[listen]\nmax_connections = \"many\"", "4:19", "a string, not a whole number", "whole number"),
    (3, "[listen]\nmax_concurrent_streams = 65537", "4:26", "out of range", "from 1 to 65536"),
    (3, "[listen]\nmax_in_flight = 0", "4:17", "out of range", "from 1 to 1000000"),
    (9, "[storage]\ncache_mib = 0", "10:13", "[storage] cache_mib: out of range", "from 1 to 65536"),
    (9, "[storage]\nreserve_mib = -1", "10:15", "out of range", "from 0 to 1048576"),
    (9, "[storage]\nchanges = 999", "10:11", "out of range", "from 1000 to 10000000"),
    (9, "[limits]\nkey_cache = 15", "10:13", "out of range", "from 16 to"),
    (9, "[limits]\nkey_generations = 0", "10:19", "out of range", "from 1 to 1024"),
    (9, "[login]\nclient_burst = 0", "10:16", "[login] client_burst: out of range", "from 1 to 10000"),
    (9, "[runtime]\nthreads = 0", "10:11", "[runtime] threads: out of range", "from 1 to 1024"),
    (9, "[runtime]\nblocking_threads = 5000", "10:20", "out of range", "from 1 to 4096"),
    // Times.
    (9, "[tokens]\naccess_ttl = 900", "10:14", "[tokens] access_ttl: a integer, not a time", "such as \"1m\""),
    (9, "[tokens]\naccess_ttl = \"900\"", "10:14", "not a time with its unit", "from 1m to 24h"),
    (9, "[tokens]\naccess_ttl = \"-15m\"", "10:14", "not a time with its unit", "from 1m to 24h"),
    (9, "[tokens]\naccess_ttl = \"59s\"", "10:14", "out of range", "from 1m to 24h"),
    (9, "[tokens]\naccess_ttl = \"25h\"", "10:14", "out of range", "from 1m to 24h"),
    (9, "[tokens]\nrefresh_ttl = \"10m\"", "10:15", "[tokens] refresh_ttl: refresh tokens would not outlive", "longer than `access_ttl`"),
    (9, "[tokens]\naccess_ttl = \"24h\"", "10:14", "[tokens] access_ttl: refresh tokens would not outlive", "longer than `access_ttl`"),
    (3, "[listen]\nhandshake_timeout = \"0s\"", "4:21", "out of range", "from 100ms to 5m"),
    (3, "[listen]\ndrain_timeout = \"1h\"", "4:17", "out of range", "from 0s to 10m"),
    (3, "[listen]\nconnection_age = \"1 fortnight\"", "4:18", "not a time with its unit", "from 0s to 168h"),
    (9, "[audit]\ncheckpoint_interval = \"0s\"", "10:23", "out of range", "from 1s to 24h"),
    (9, "[login]\naddress_interval = \"1ms\"", "10:20", "out of range", "from 10ms to 1h"),
    // Sinks.
    (9, "[audit.sinks.a]\npath = \"p\"", "9:14", "[audit.sinks.a] kind: missing", "add `kind = \"file\"`"),
    (9, "[audit.sinks.a]\nkind = \"kafka\"", "10:8", "not a kind of sink", "\"syslog\" or \"otlp\""),
    (9, "[audit.sinks.a]\nkind = \"otlp\"", "9:14", "[audit.sinks.a] endpoint: missing", "add `endpoint ="),
    (9, "[audit.sinks.a]\nkind = \"otlp\"\nendpoint = \"http://h:1\"\nheaders = { a = { env = \"X\" } }", "12:11", "in the clear", "https://"),
    (9, "[audit]\ncheckpoint_signatures = [\"ml-dsa-65\"]", "10:25", "not the signatures", "\"ed25519\", \"ml-dsa-65\""),
    (9, "[audit]\ncheckpoint_signatures = \"ed25519\"", "10:25", "a string, not a list", "\"ml-dsa-65\""),
    (9, "[audit]\nkeep = \"400d\"", "10:8", "never just deleted", "in `archive`"),
    (9, "[audit]\nkeep = \"400\"\narchive = \"a\"", "10:8", "not a time with its unit", "such as \"400d\""),
    (9, "[audit]\nkeep = \"0d\"\narchive = \"a\"", "10:8", "out of range", "from 1s to 36500d"),
    (9, "[audit]\narchive = \"a\"", "10:11", "nothing is archived without", "add `keep`"),
    (9, "[audit.sinks.a]\nkind = \"file\"", "9:14", "[audit.sinks.a] path: missing", "add `path ="),
    (9, "[audit.sinks.a]\nkind = \"file\"\npath = \"p\"\nkeep = 0", "12:8", "out of range", "from 1 to 10000"),
    (9, "[audit.sinks.a]\nkind = \"file\"\npath = \"p\"\nsocket = \"s\"", "12:1", "`socket` is not an option", "options are: content"),
    (9, "[audit.sinks.a]\nkind = \"file\"\npath = \"p\"\n[audit.sinks.b]\nkind = \"file\"\npath = \"p\"", "12:14", "another sink writes the same file", "of its own"),
    (9, "[audit.sinks.\"../x\"]\nkind = \"file\"\npath = \"p\"", "9:14", "none of a sink", "1 to 64 of"),
    (9, "[audit]\nsinks = 3", "10:9", "[audit] sinks: a integer", "as a table"),
    (9, "[audit.sinks.a]\nkind = \"syslog\"", "9:14", "[audit.sinks.a] socket: missing", "either `socket` or `address`"),
    (9, "[audit.sinks.a]\nkind = \"syslog\"\nsocket = \"s\"\naddress = \"h:1\"", "11:10", "an `address` as well", "either `socket` or `address`"),
    (9, "[audit.sinks.a]\nkind = \"syslog\"\naddress = \"host\"", "11:11", "not a host with a port", "HOST:PORT"),
    (9, "[audit.sinks.a]\nkind = \"syslog\"\nsocket = \"s\"\nca = \"c\"", "12:6", "to an `address` alone", "remove it"),
    (9, "[audit.sinks.a]\nkind = \"syslog\"\naddress = \"h:1\"\nca = \"c\"\nkey = \"k\"", "9:14", "go together", "both, or neither"),
    (9, "[audit.sinks.a]\nkind = \"syslog\"\naddress = \"h:1\"\nfacility = 24", "12:12", "out of range", "from 0 to 23"),
    // Words.
    (9, "[audit]\ndata_plane = \"sometimes\"", "10:14", "[audit] data_plane: not one of its words", "\"buffered\" or \"durable\""),
    (9, "[log]\nlevel = \"verbose\"", "10:9", "[log] level: not one of its words", "\"off\" or \"error\""),
    (9, "[log]\nformat = \"xml\"", "10:10", "[log] format: not one", "\"json\" or \"pretty\""),
    (9, "[replication]\nmode = \"sync\"", "9:2", "[replication] target: missing", "postgres://USER@HOST"),
    (9, "[replication]\ntarget = \"postgres://u@h/d\"\nwhen_away = \"degrade\"", "11:13", "nothing waits for the target", "mode = \"sync\""),
    (9, "[replication]\ntarget = \"postgres://u@h/d\"\nmode = \"raft\"", "11:8", "not one of its words", "\"async\" or \"sync\""),
    (9, "[replication]\ntarget = \"postgres://u@h/d\"\ntimeout = \"1m\"", "11:11", "out of range", "from 100ms to 30s"),
    #[cfg(feature = "postgres")]
    (9, "[replication]\ntarget = \"postgres://u:CANARY-hunter2-Zm9vYmFy@h/d\"", "10:10", "holds a password", "`password`"),
    #[cfg(feature = "postgres")]
    (9, "[replication]\ntarget = \"mysql://u@h/d\"", "10:10", "has the form postgres://", "postgres://USER@HOST"),
    #[cfg(feature = "postgres")]
    (9, "[replication]\ntarget = \"postgres://u@h/d\"\nschema = \"Keys\"", "10:10", "lower-case letters", "postgres://USER@HOST"),
    (9, "[storage]\nkind = \"memory\"", "10:8", "[storage] kind: a store that forgets everything", "tmpfs"),
    #[cfg(not(feature = "postgres"))]
    (9, "[storage]\nkind = \"postgres\"", "10:8", "this build knows no databases", "feature `postgres`"),
    (9, "[storage]\nkind = \"sqlite\"", "10:8", "not a kind of store", "write \"redb\""),
    (9, "[anchor]", "9:2", "[anchor] file: missing", "add `file = "),
    (9, "[anchor]\nwrapper = \"hsm\"", "10:11", "there is no wrapper of this name", "PKCS#11 token"),
    (9, "[anchor]\nwrapper = \"master_key\"", "10:11", "not the wrapper of a PKCS#11 token", "give a file"),
    (9, "[anchor]\nfile = \"/m/a\"\nwrapper = \"master_key\"", "10:8", "there is a wrapper, too", "keep one"),
    (9, "[anchor]\nfile = \"/m/a\"\nlabel = \"a\"", "11:9", "of an object in a token", "name its wrapper"),
    (9, "[anchor]\nreplication = true", "10:15", "there is no [replication]", "add [replication]"),
    (9, "[anchor]\nfile = \"/m/a\"\nreplication = true", "11:15", "there is another place, too", "keep one"),
    (9, "[anchor]\nlabel = \"a b\"", "10:9", "not a label", "no spaces"),
    (9, "[anchor]\nfile = \"d/polykey.redb\"", "10:8", "the store itself", "another medium"),
    (9, "kind = \"tpm\"", "9:8", "not a kind of wrapper", "write \"local\""),
    (9, "[hardened]", "9:2", "[hardened] wrapper: missing", "add `wrapper = "),
    (9, "[hardened]\nwrapper = \"cloud\"", "10:11", "there is no wrapper of this name", "hardware module"),
    (9, "[hardened]\nwrapper = \"master_key\"", "10:11", "which protects nothing more", "hardware module"),
    (9, "[hardened]\nwrapper = \"w\"\n[wrappers.w]\nsource = { env = \"K\" }", "10:11", "which protects nothing more", "hardware module"),
    (9, "[hardened]\ncache = \"25h\"", "10:9", "[hardened] cache: out of range", "from 0s to 24h"),
    (9, "kind = \"aws-kms\"", "9:8", "not a kind of wrapper", "write \"aws\""),
    // Secrets and references to them.
    (8, "source = \"CANARY-hunter2-Zm9vYmFy\"", "8:10", "[master_key] source: a string where a reference", "{ env = \"…\" }"),
    (8, "source = { value = \"CANARY-hunter2-Zm9vYmFy\" }", "8:10", "not a kind of reference", "{ file ="),
    (8, "source = { CANARY-hunter2-Zm9vYmFy = \"x\" }", "8:10", "not a kind of reference", "{ file ="),
    (8, "source = { file = \"a\", env = \"B\" }", "8:10", "exactly one place", "{ credential ="),
    (8, "source = {}", "8:10", "exactly one place", "{ credential ="),
    (8, "source = { file = \"\" }", "8:10", "names no place", "{ file ="),
    (8, "source = { file = 7 }", "8:10", "names no place", "{ file ="),
    (8, "source = { env = \"CANARY-hunter2-Zm9vYmFy=\" }", "8:10", "not the name of an environment variable", "letters, digits and _"),
    (8, "source = { credential = \"../x\" }", "8:10", "not the name of a credential", "LoadCredential="),
    (8, "passphrase = \"CANARY-hunter2-Zm9vYmFy\"", "8:14", "[master_key] passphrase: a string", "{ file ="),
    (9, "passphrase = { env = \"P\" }", "9:14", "there is a `source` as well", "keep one"),
    (9, "argon2 = { passes = 3 }", "9:10", "no passphrase to stretch", "remove it"),
    (8, "passphrase = { env = \"P\" }\nargon2 = { passes = 1 }", "9:21", "[master_key.argon2] passes: out of range", "from 2 to 16"),
    (8, "passphrase = { env = \"P\" }\nargon2 = { memory_kib = 8 }", "9:25", "out of range", "from 19456 to 1048576"),
    (8, "passphrase = { env = \"P\" }\nargon2 = { time = 8 }", "9:12", "[master_key.argon2]: `time` is not", "options are: lanes"),
    (8, "passphrase = { env = \"P\" }\nargon2 = 3", "9:10", "argon2: a integer", "as a table"),
];

#[test]
fn every_mistake_is_told_with_its_place_and_remedy() {
    let (mut tried, mut missed) = (0, Vec::new());
    for (line, text, place, what, remedy) in BROKEN {
        let text = edited(*line, text);
        let errors = match parse(&text) {
            Ok(_) => panic!("accepted:\n{text}"),
            Err(errors) => errors,
        };
        let shown = errors.to_string();
        let at = format!("/etc/polykey/polykey.toml:{place}: ");
        let told = errors.0.iter().any(|problem| {
            problem.to_string().starts_with(&at)
                && problem.what.contains(what)
                && problem.remedy.contains(remedy)
        });
        if !told {
            missed.push(format!("{at}{what}; {remedy}\nnot in\n{shown}\n"));
        }
        for secret in [CANARY, "hunter2", "Zm9vYmFy"] {
            assert!(!shown.contains(secret), "repeats a value: {shown}");
        }
        tried += 1;
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
    assert!(tried >= 90, "{tried}");
}

#[test]
fn limits_are_held_against_each_other() {
    let errors = parse(&edited(3, "[listen]\nmax_connections = 10")).unwrap_err();
    assert!(errors.to_string().contains("more than `max_connections`"), "{errors}");
    parse(&edited(3, "[listen]\nmax_connections = 10\nmax_handshakes = 10")).unwrap();
}

#[test]
fn all_mistakes_come_at_once_and_in_order() {
    let text =
        "[node]\nname = 1\n[listen]\nkey = 3\nhealth = \"0.0.0.0:1\"\n[log]\nlevel = 1\n[x]\n";
    let errors = parse(text).unwrap_err().0;
    let lines: Vec<_> = errors.iter().map(|p| p.place.unwrap().0).collect();
    assert!(lines.is_sorted(), "{lines:?}");
    for line in [1, 2, 3, 4, 5, 7, 8] {
        assert!(lines.contains(&line), "{line} in {lines:?}: {errors:?}");
    }
}

#[test]
fn columns_count_characters() {
    let errors = parse(&edited(9, "[log]\n# é\nlevel = \"ééé\" ; x")).unwrap_err();
    assert!(errors.0.iter().any(|p| p.place == Some((11, 15))), "{errors}");
}

#[test]
fn what_is_no_text_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.toml");
    std::fs::write(&file, b"[node]\nab = \"\xff\"\n").unwrap();
    let errors = Config::load(&file).unwrap_err();
    assert_eq!(errors.0[0].place, Some((2, 7)));
    let missing = Config::load(&dir.path().join("none.toml")).unwrap_err();
    assert!(missing.to_string().contains("check the path"), "{missing}");
    std::fs::write(&file, vec![b'#'; 1024 * 1024 + 1]).unwrap();
    assert!(Config::load(&file).unwrap_err().to_string().contains("larger than"));
}

#[test]
fn paths_are_relative_to_the_file() {
    let config = parse(BASE).unwrap();
    assert_eq!(config.node.data_dir, Path::new("/etc/polykey/d"));
    assert_eq!(config.storage.path, Path::new("/etc/polykey/d/polykey.redb"));
    let file = MasterKeySource::File("/etc/polykey/m.key".into());
    assert_eq!(config.master_key, Wrapper::Local(file));
    let config = Config::parse(Path::new("p.toml"), BASE).unwrap();
    assert_eq!(config.listen.tls.key, Path::new("s.key"));
}

/// What a build with AWS says to the same text, and one without.
#[test]
#[cfg(feature = "aws")]
fn hardened_keys_lie_under_a_wrapper_that_is_not_of_this_machine() {
    let cloud = "kind = \"aws\"\nkey = \"alias/polykey\"\nregion = \"eu-west-1\"\n";
    let with = |hardened: &str| {
        let text = format!("{BASE}\n[wrappers.cloud]\n{cloud}\n[hardened]\n{hardened}");
        parse(&text).unwrap().hardened.unwrap()
    };
    let found = with("wrapper = \"cloud\"");
    assert_eq!((found.wrapper.as_str(), found.cache), ("cloud", Duration::from_secs(300)));
    assert_eq!(with("wrapper = \"cloud\"\ncache = \"0s\"").cache, Duration::ZERO);
    assert_eq!(parse(BASE).unwrap().hardened, None);
    // That of the root key will do.
    let text = BASE.replace("source = { file = \"m.key\" }", cloud);
    let text = format!("{text}\n[hardened]\nwrapper = \"master_key\"\n");
    assert_eq!(parse(&text).unwrap().hardened.unwrap().wrapper, "master_key");
}

#[test]
fn aws_is_a_kind_of_wrapper_where_the_build_has_it() {
    let spare = format!(
        "{BASE}\n[wrappers.cloud]\nkind = \"aws\"\nkey = \"alias/polykey\"\nregion = \"eu-west-1\"\n\
         attempt_timeout = \"1s\"\n\n[bootstrap]\nprofile = \"node\"\ndeadline = \"3s\"\n\n[tokens]\n\
         signing_key = {{ ssm = \"/polykey/signing\" }}\n"
    );
    let parsed = parse(&spare);
    if !cfg!(feature = "aws") {
        let text = parsed.unwrap_err().to_string();
        assert!(
            text.contains("no AWS KMS backend") && text.contains("reads nothing from AWS"),
            "{text}"
        );
        assert!(text.contains("feature `aws`"), "{text}");
        return;
    }
    let config = parsed.unwrap();
    let Some(Wrapper::Aws(settings)) = config.wrappers.get("cloud") else { panic!() };
    assert_eq!(settings.key, "alias/polykey");
    assert_eq!(settings.connection.region.as_deref(), Some("eu-west-1"));
    assert_eq!(settings.connection.attempt_timeout, Duration::from_secs(1));
    assert_eq!(config.bootstrap.aws.profile.as_deref(), Some("node"));
    assert_eq!(config.bootstrap.deadline, Duration::from_secs(3));
    assert_eq!(config.tokens.signing_key, Some(SecretSource::Ssm("/polykey/signing".into())));
    let wrong = format!("{BASE}\n[wrappers.cloud]\nkind = \"aws\"\nsource = {{ env = \"K\" }}\n");
    let text = parse(&wrong).unwrap_err().to_string();
    assert!(text.contains("[wrappers.cloud] key: missing"), "{text}");
    assert!(text.contains("`source` is not an option"), "{text}");
    let wrong = edited(8, "source = { ssm = \"no parameter\" }");
    let text = parse(&wrong).unwrap_err().to_string();
    assert!(text.contains("not the name of an SSM parameter"), "{text}");
}

#[test]
fn a_token_is_told_by_module_label_key_and_pin() {
    let section = "[wrappers.hsm]\nkind = \"pkcs11\"\nmodule = \"/m.so\"\ntoken = { label = \"polykey\" }\n\
        key = { label = \"kek\", id = \"01aF\" }\npin = { credential = \"pin\" }\n\
        mechanism = \"aes-gcm\"\ntimeout = \"2s\"\nenvironment = { SOFTHSM2_CONF = \"/c\" }\n";
    let config = parse(&edited(9, section)).unwrap();
    let Some(Wrapper::Pkcs11(Pkcs11 { token, key })) = config.wrappers.get("hsm") else { panic!() };
    assert_eq!(token.module, Path::new("/m.so"));
    assert_eq!(token.pin, SecretSource::Credential("pin".into()));
    assert_eq!((token.call_timeout, token.queue), (Duration::from_secs(2), 64));
    assert_eq!(token.environment, [("SOFTHSM2_CONF".to_owned(), "/c".to_owned())]);
    assert_eq!((key.label.as_deref(), key.id.as_deref()), (Some("kek"), Some(&[1, 0xaf][..])));
    for (from, to, said) in [
        ("module = \"/m.so\"\n", "", "[wrappers.hsm] module: missing"),
        ("token = { label = \"polykey\" }\n", "", "[wrappers.hsm] token: missing"),
        ("{ label = \"polykey\" }", "{ label = \"a\", slot = 1 }", "not exactly one of label"),
        ("{ label = \"polykey\" }", "{ name = \"a\" }", "`name` is not an option"),
        (
            "{ label = \"polykey\" }",
            "{ label = \"a label that is longer than any token has\" }",
            "1 to 32",
        ),
        ("key = { label = \"kek\", id = \"01aF\" }\n", "", "[wrappers.hsm] key: missing"),
        ("\"01aF\"", "\"1\"", "not hexadecimal"),
        ("pin = { credential = \"pin\" }", "pin = \"CANARY-hunter2-Zm9vYmFy\"", "pin: a string"),
        ("aes-gcm", "des", "not a mechanism"),
        ("timeout = \"2s\"", "timeout = \"2m\"", "out of range"),
        ("\"/c\"", "1", "no text"),
    ] {
        assert!(section.contains(from), "{from}");
        let text = parse(&edited(9, &section.replace(from, to))).unwrap_err().to_string();
        assert!(text.contains(said) && !text.contains(CANARY), "{said}: {text}");
    }
}

#[test]
fn a_quorum_is_of_wrappers_that_are_none() {
    let base = "[wrappers.a]\nsource = { env = \"A\" }\n[wrappers.q]\nkind = \"quorum\"\n\
        of = [\"master_key\", \"a\"]\nthreshold = 2\n";
    let config = parse(&edited(9, base)).unwrap();
    let of = vec!["master_key".to_owned(), "a".to_owned()];
    assert_eq!(config.wrappers["q"], Wrapper::Quorum(Quorum { threshold: 2, of }));
    for (from, to, said) in [
        ("\"a\"]", "\"b\"]", "no wrapper has one of these names"),
        ("\"a\"]", "\"q\"]", "its own member"),
        ("\"a\"]", "\"master_key\"]", "stands in it twice"),
        (", \"a\"]", "]", "not 2 to 16 wrappers"),
        ("threshold = 2", "threshold = 3", "more than there are members"),
        ("threshold = 2", "threshold = 1", "out of range"),
        ("threshold = 2", "", "threshold: missing"),
    ] {
        let text = parse(&edited(9, &base.replace(from, to))).unwrap_err().to_string();
        assert!(text.contains(said), "{said}: {text}");
    }
    let nested =
        base.to_owned() + "[wrappers.r]\nkind = \"quorum\"\nof = [\"q\", \"a\"]\nthreshold = 2\n";
    let text = parse(&edited(9, &nested)).unwrap_err().to_string();
    assert!(text.contains("a quorum cannot be a member of a quorum"), "{text}");
}

#[test]
fn tls_material_may_be_referred_to() {
    let text = BASE.replace("key = \"s.key\"", "key = { credential = \"tls-key\" }");
    let config = parse(&text).unwrap();
    let key = Some(SecretSource::Credential("tls-key".into()));
    assert_eq!(config.listen.references.key, key);
    assert_eq!(config.listen.tls.key, Path::new("credential tls-key"));
    assert_eq!(config.listen.references.certificate, None);
    let text = BASE.replace("key = \"s.key\"", "key = { file = \"s.key\" }");
    assert_eq!(parse(&text).unwrap(), parse(BASE).unwrap());
}

#[test]
fn passphrases_come_with_their_cost() {
    let text = edited(8, "passphrase = { credential = \"p\" }\nargon2 = { lanes = 1 }");
    let params = PassphraseParams { lanes: 1, ..PassphraseParams::default() };
    let from = SecretSource::Credential("p".into());
    let passphrase = Wrapper::Local(MasterKeySource::Passphrase { from, params });
    assert_eq!(parse(&text).unwrap().master_key, passphrase);
}

fn example() -> String {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("packaging/polykey.example.toml");
    std::fs::read_to_string(file).unwrap()
}

#[test]
fn the_example_shows_the_defaults() {
    let plain = parse(&example()).unwrap();
    let spelt_out = parse(&example().replace("\n#: ", "\n")).unwrap();
    assert_eq!(plain, Config { written: plain.written.clone(), ..spelt_out });
    // Each default that is shown must be read, not skipped: the text must differ in these lines.
    assert_eq!(example().matches("\n#: ").count(), 38);
}

#[test]
fn the_optional_examples_are_valid() {
    let all = example().replace("\n#: ", "\n").replace("\n#? ", "\n");
    // A node has a master key or a passphrase, not both.
    let all = all.replace("\nsource = { file", "\n# source = { file");
    let parsed = parse(&all);
    for (there, name) in [(cfg!(feature = "aws"), "aws"), (cfg!(feature = "postgres"), "postgres")]
    {
        if !there {
            assert!(parsed.unwrap_err().to_string().contains(&format!("feature `{name}`")));
            return;
        }
    }
    let config = parsed.unwrap();
    assert!(
        config.ca.is_some() && config.listen.health.is_some() && config.listen.tls.crl.is_some()
    );
    let telemetry = config.telemetry.unwrap();
    let collector = telemetry.collector;
    assert!(collector.headers.len() == 1 && telemetry.sample == 50_000 && collector.tls());
    assert_eq!(config.listen.metrics.unwrap().port(), 9464);
    assert_eq!(config.webhooks["operations"].events.len(), 4);
    assert_eq!(config.listen.net.workers, Some(2));
    assert_eq!(config.audit.sinks.keys().collect::<Vec<_>>(), ["collector", "disk", "otel"]);
    assert_eq!(config.replication.unwrap().mode, replication::Mode::SyncOrRefuse);
    assert_eq!(config.wrappers.keys().collect::<Vec<_>>(), ["both", "cloud", "hsm", "spare"]);
}

#[test]
fn wrappers_are_read_as_the_master_key_is() {
    let config = parse(&edited(
        9,
        "[wrappers.a]\nsource = { env = \"POLYKEY_A\" }\n[wrappers.b]\n\
        passphrase = { file = \"words\" }\n",
    ))
    .unwrap();
    let a = Wrapper::Local(MasterKeySource::Env("POLYKEY_A".into()));
    let from = SecretSource::File("/etc/polykey/words".into());
    let b =
        Wrapper::Local(MasterKeySource::Passphrase { from, params: PassphraseParams::default() });
    assert_eq!(config.wrappers.into_iter().collect::<Vec<_>>(), [("a".into(), a), ("b".into(), b)]);
    for (text, said) in [
        ("[wrappers]\na = 1", "where a section belongs"),
        ("[wrappers.master_key]\nsource = { env = \"A\" }", "none of a wrapper"),
        ("[wrappers.\"a b\"]\nsource = { env = \"A\" }", "none of a wrapper"),
        ("[wrappers.a]\n", "[wrappers.a] source: missing"),
        ("[wrappers.a]\nsource = \"CANARY-hunter2-Zm9vYmFy\"", "[wrappers.a] source"),
        ("[wrappers.a]\nsauce = 1\nsource = { env = \"A\" }", "[wrappers.a]: `sauce`"),
    ] {
        let errors = parse(&edited(9, text)).unwrap_err().to_string();
        assert!(errors.contains(said) && !errors.contains(CANARY), "{text}: {errors}");
    }
}

#[test]
fn the_example_documents_every_option() {
    // The options themselves tell their names when one is unknown.
    let mut text = String::new();
    let sections = "node listen storage anchor replication master_key hardened tokens login audit policies limits log ca runtime";
    for section in sections.split(' ') {
        text.push_str(&format!("[{section}]\nxxxxxxxxxxxxxxxx = 1\n"));
    }
    let errors = parse(&text).unwrap_err();
    let lists: Vec<_> =
        errors.0.iter().filter_map(|p| p.remedy.strip_prefix("remove it; options are: ")).collect();
    assert_eq!(lists.len(), sections.split(' ').count());
    let example = example();
    for option in lists.iter().flat_map(|list| list.split(", ")) {
        let documented = example.lines().any(|l| {
            let l = l.trim_start_matches(['#', ':', '?', ' ']);
            l.starts_with(&format!("{option} = ")) || l.starts_with(&format!("[audit.{option}."))
        });
        assert!(documented, "{option} is not in the example");
    }
}

#[test]
fn durations_may_be_compound() {
    let config = parse(&edited(9, "[tokens]\naccess_ttl = \"1h 30m\"")).unwrap();
    assert_eq!(config.tokens.access_ttl, Duration::from_secs(5400));
    let config = parse(&edited(3, "[listen]\nconnection_age = \"0s\"")).unwrap();
    assert_eq!(config.listen.net.max_age, None);
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in ".{0,200}") {
        drop(parse(&text));
        drop(parse(&format!("{BASE}{text}")));
    }

    #[test]
    fn no_cut_or_flip_of_the_example_panics(at in 0_usize..9000, byte in proptest::num::u8::ANY) {
        let mut bytes = example().into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        drop(parse(&String::from_utf8_lossy(&bytes)));
        bytes.truncate(at);
        drop(parse(&String::from_utf8_lossy(&bytes)));
    }
}

#[cfg(feature = "postgres")]
#[test]
fn a_store_in_a_database_is_taken_apart_and_its_password_kept_out() {
    let database = |text: &str| {
        let text = format!("[storage]\nkind = \"postgres\"\n{text}");
        parse(&edited(9, &text)).map(|config| config.storage.database.unwrap())
    };
    let found = database("url = \"postgres://p@db/keys\"").unwrap();
    assert_eq!((found.schema.as_str(), found.connections, found.durable), ("polykey", 8, true));
    assert_eq!((found.freshness, found.strict), (Duration::from_secs(1), false));
    assert_eq!(found.when_fenced, WhenFenced::Refuse);
    let whole = "url = \"postgresql://p@a:1,b:2/keys\"\npassword = { env = \"PGPW\" }\n\
                 schema = \"s_1\"\nname = \"n1\"\nfreshness = \"500ms\"\nstrict = true\n\
                 when_fenced = \"read\"";
    let found = database(whole).unwrap();
    assert_eq!(found.password, Some(SecretSource::Env("PGPW".into())));
    assert_eq!(found.when_fenced, WhenFenced::Read);
    for (text, said) in [
        ("", "[storage] url"),
        ("url = \"mysql://p@db/keys\"", "not a connection string"),
        ("url = \"postgres://u:CANARY-hunter2-Zm9vYmFy@h/db\"", "with a password in it"),
        ("url = \"postgres://u:CANARY-hunter2-Zm9vYmFy/ss@h/db\"", "with a password in it"),
        ("url = \"postgres://u@h/db?password=CANARY-hunter2-Zm9vYmFy\"", "with a password in it"),
        ("url = \"postgres://p@db/k\"\nschema = \"Bad;\"", "not the name of a schema"),
        ("url = \"postgres://p@db/k\"\nfreshness = \"2s\"", "from 200ms to 1s"),
        ("url = \"postgres://p@db/k\"\nwhen_fenced = \"write\"", "\"refuse\" or \"read\""),
        ("url = \"postgres://p@db/k\"\npath = \"x\"", "`path`"),
    ] {
        let errors = database(text).unwrap_err().to_string();
        assert!(errors.contains(said) && !errors.contains(CANARY), "{text}: {errors}");
    }
}

#[test]
fn a_sink_is_a_file_or_a_syslog_collector() {
    use sinks::{Content, FileTarget, SyslogTarget, Target, Way};
    let sinks = |text: &str| parse(&edited(9, text)).unwrap().audit.sinks;
    let found = sinks(
        "[audit.sinks.disk]\nkind = \"file\"\npath = \"a.jsonl\"\n[audit.sinks.siem]\n\
         kind = \"syslog\"\naddress = \"log.example:6514\"\nca = \"ca.pem\"\n\
         content = \"events\"\nfacility = 4\n",
    );
    let path = "/etc/polykey/a.jsonl".into();
    let disk = Sink {
        target: Target::File(FileTarget { path, max_mib: 64, keep: 16 }),
        content: Content::Leaves,
    };
    let (address, ca) = ("log.example:6514".to_owned(), "/etc/polykey/ca.pem".into());
    let way = Way::Tls { address, ca, client: None };
    let siem = Sink {
        target: Target::Syslog(SyslogTarget { way, facility: 4 }),
        content: Content::Events,
    };
    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        [("disk".into(), disk), ("siem".into(), siem)]
    );
    let local = sinks("[audit.sinks.a]\nkind = \"syslog\"\nsocket = \"/dev/log\"\n");
    let Target::Syslog(local) = &local["a"].target else { panic!() };
    assert_eq!(*local, SyslogTarget { way: Way::Unix("/dev/log".into()), facility: 13 });
    assert!(parse(BASE).unwrap().audit.sinks.is_empty());
}
