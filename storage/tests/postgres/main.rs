//! The store on PostgreSQL against the conformance suite, through lost connections, rolled back
//! transactions and stopped servers, and beside other nodes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

mod faults;
#[path = "../replica/growth.rs"]
mod growth;
mod nodes;
mod opening;
mod proxy;
mod replication;
mod server;

use std::sync::{Mutex, PoisonError};

use futures::executor::block_on;
use polykey_storage::{
    conformance::{self, Rng},
    postgres::{Options, Postgres},
};

use self::{
    proxy::Proxy,
    server::{Pooler, Server, schema},
};

fn suite(server: &Server, options: impl Fn(&str) -> Options, faults: bool) {
    // Opened by the suite twice; the second one makes the commits.
    let rng = Mutex::new(Rng::new(conformance::seed()));
    block_on(conformance::suite(|| {
        let store = Postgres::open(options(&schema())).unwrap();
        if faults {
            let seed = rng.lock().unwrap_or_else(PoisonError::into_inner).number();
            let mut rng = Rng::new(seed);
            store.inject(move || rng.chance(10));
        }
        store
    }));
    drop(server.sql("SELECT 1"));
}

#[test]
fn conforms() {
    let server = Server::shared();
    suite(&server, |schema| server.options(schema), false);
}

#[test]
fn conforms_through_pgbouncer_in_transaction_mode_with_few_changes_kept() {
    let server = Server::shared();
    let pooler = Pooler::before(&server);
    let options = |schema: &str| Options {
        transaction_pooler: true,
        changes: 7,
        ..server.options_at(pooler.port, schema)
    };
    suite(&server, options, false);
}

#[test]
fn conforms_while_a_tenth_of_the_statements_is_rolled_back() {
    let server = Server::shared();
    let proxy = Proxy::before(server.port);
    suite(&server, |schema| server.options_at(proxy.port, schema), true);
}
