//! What is refused at opening, and in which words.

use std::{path::Path, sync::Arc};

use futures::executor::block_on;
use polykey_storage::{
    Commit, Health, NoFinish, OpenError, Space, Store, StoreError,
    postgres::{Options, Postgres, SCHEMA},
};

use crate::server::{ROLE, Server, authority, schema};

fn refused(options: Options) -> StoreError {
    match Postgres::open(options) {
        Err(OpenError::Store { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

fn encrypted(server: &Server, host: &str, authority: &Path) -> Options {
    let (port, authority) = (server.port, authority.display());
    let url =
        format!("postgres://{ROLE}@{host}:{port}/keys?sslmode=verify-full&sslrootcert={authority}");
    Options { url, ..server.options(&schema()) }
}

#[test]
fn tls_is_verified() {
    let server = Server::shared();
    let store = Postgres::open(encrypted(&server, "localhost", &server.authority())).unwrap();
    block_on(store.commit(vec![Commit::new().put(Space(1), *b"k", "v")], &mut NoFinish)).unwrap();
    let count = "SELECT count(*) > 0 FROM pg_stat_ssl WHERE ssl AND version = 'TLSv1.3'";
    assert_eq!(server.sql(count), "t");

    let directory = tempfile::tempdir().unwrap();
    let wrong = directory.path().join("wrong.pem");
    std::fs::write(&wrong, authority().0).unwrap();
    let error = refused(encrypted(&server, "localhost", &wrong));
    assert!(matches!(error, StoreError::Tls(_)), "{error:?}");
    assert!(error.to_string().contains("invalid peer certificate"), "{error}");

    // The right authority, and another name.
    let error = refused(encrypted(&server, "127.0.0.1", &server.authority()));
    assert!(matches!(error, StoreError::Tls(_)), "{error:?}");

    let error = refused(encrypted(&server, "localhost", Path::new("/no/such/file.pem")));
    assert!(error.to_string().contains("/no/such/file.pem"), "{error}");
}

#[test]
fn a_refused_login_says_so_and_shows_no_password() {
    let server = Server::shared();
    let password = "wrong password of this test";
    let options = Options {
        password: Some(Arc::new(move || Ok(password.to_owned().into()))),
        ..server.options(&schema())
    };
    let opened = Postgres::open(options.clone()).unwrap_err();
    let text = format!("{opened} {opened:?} {options:?}");
    assert!(!text.contains(password), "{text}");
    assert!(text.contains("polykey@127.0.0.1"), "{text}");
    assert!(matches!(refused(options), StoreError::Refused(_)), "{text}");

    let options = Options {
        password: Some(Arc::new(|| Err("/etc/polykey/password: no such file".into()))),
        ..server.options(&schema())
    };
    assert!(refused(options).to_string().contains("/etc/polykey/password"));

    let url = "postgres://polykey:hunter2@127.0.0.1/keys".to_owned();
    let error = refused(Options { url, ..server.options(&schema()) });
    assert!(!error.to_string().contains("hunter2") && error.to_string().contains("password"));

    let url = format!("postgres://{ROLE}@127.0.0.1:{}/nowhere?sslmode=disable", server.port);
    let error = refused(Options { url, ..server.options(&schema()) });
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");

    let options = Options { schema: "no\"good".into(), ..server.options("s") };
    assert!(refused(options).to_string().contains("lower-case"));
}

#[test]
fn nobody_there() {
    let server = Server::shared();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = Options {
        call_timeout: std::time::Duration::from_millis(300),
        ..server.options_at(port, &schema())
    };
    let error = refused(options);
    assert!(matches!(error, StoreError::Unreachable(_)), "{error:?}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn a_newer_schema_is_left_alone() {
    let server = Server::shared();
    let schema = schema();
    let store = server.open(&schema);
    let newer = SCHEMA + 1;
    server.sql(&format!("INSERT INTO {schema}.migrations VALUES ({newer}, now())"));
    for refused in
        [block_on(store.reopen()).map(drop), Postgres::open(server.options(&schema)).map(drop)]
    {
        match refused {
            Err(OpenError::NewerFormat { found, supported, .. }) => {
                assert_eq!((found, supported), (newer, SCHEMA));
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(store.status().health, Health::NeedsReopen(_)));
}

#[test]
fn a_role_that_may_not_make_the_tables_is_told_what_it_lacks() {
    let server = Server::shared();
    let schema = schema();
    server.sql(&format!("CREATE SCHEMA {schema}"));
    let error = refused(server.options(&schema));
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    assert!(error.to_string().contains("own the schema"), "{error}");
    // It need not create schemas.
    server.sql(&format!("GRANT USAGE, CREATE ON SCHEMA {schema} TO {ROLE}"));
    drop(server.open(&schema));
    // Nor own anything once the tables stand.
    server.sql(&format!(
        "REVOKE CREATE ON SCHEMA {schema} FROM {ROLE}; ALTER TABLE {schema}.rows OWNER TO postgres; \
         GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.rows TO {ROLE}"
    ));
    let store = server.open(&schema);
    block_on(store.commit(vec![Commit::new().put(Space(1), *b"k", "v")], &mut NoFinish)).unwrap();
}

#[test]
fn a_database_that_forgets_is_refused_unless_that_is_accepted() {
    let server = Server::shared();
    server.sql("CREATE ROLE forgetful LOGIN PASSWORD 'correct horse'; GRANT polykey TO forgetful");
    server.sql("ALTER ROLE forgetful SET synchronous_commit = off; GRANT CREATE ON DATABASE keys TO forgetful");
    let url = format!("postgres://forgetful@127.0.0.1:{}/keys?sslmode=disable", server.port);
    let options = Options { url, ..server.options(&schema()) };
    let error = refused(Options { durable: true, ..options.clone() });
    assert!(matches!(error, StoreError::NotDurable(_)), "{error:?}");
    for setting in ["synchronous_commit = off", "fsync = off"] {
        assert!(error.to_string().contains(setting), "{error}");
    }
    let durability = Postgres::open(options).unwrap().durability();
    assert_eq!(durability.synchronous_commit.as_deref(), Some("off"));
    assert_eq!(durability.fsync, Some(false));
    assert_eq!(durability.full_page_writes, Some(true));
    assert_eq!(durability.synchronous_standby_names, None);
}

#[test]
fn another_history_is_refused() {
    let server = Server::shared();
    let schema = schema();
    let store = server.open(&schema);
    for _ in 0..3 {
        block_on(store.commit(vec![Commit::new().put(Space(1), *b"k", "v")], &mut NoFinish))
            .unwrap();
    }
    let short = std::time::Duration::from_millis(300);
    let refused = |store: &Postgres, words: &str| {
        let error = block_on(store.reopen()).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert!(block_on(store.get(Space(1), b"k")).is_err());
    };
    drop(store);
    let store = Postgres::open(Options { call_timeout: short, ..server.options(&schema) }).unwrap();
    // As after the restore of a backup.
    server.sql(&format!("UPDATE {schema}.head SET revision = 2"));
    refused(&store, "back at revision 2, and 3 was acknowledged");
    server.sql(&format!("UPDATE {schema}.head SET revision = 3"));
    block_on(store.reopen()).unwrap();
    server.sql(&format!(
        "UPDATE {schema}.head SET store_id = decode(repeat('00', 15) || '01', 'hex')"
    ));
    refused(&store, "another store");
}

#[test]
fn it_may_be_opened_and_used_within_a_runtime() {
    let server = Server::shared();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = server.open(&schema());
        let put = vec![Commit::new().put(Space(1), *b"k", "v")];
        store.commit(put, &mut NoFinish).await.unwrap();
        assert_eq!(store.get(Space(1), b"k").await.unwrap().unwrap().value, "v");
    });
}
