//! One session: how it is begun, what is found out about the other side, and its statements.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{task::AbortHandle, time::Instant};
use tokio_postgres::{
    Client, NoTls, Row, SimpleQueryMessage, Statement,
    types::{ToSql, Type},
};

use super::{
    Context, Durability, Options,
    failure::{Failure, Kind, within},
    statements::Query,
    tls::Tls,
};
use crate::StoreError;

/// The parameters of a statement.
pub(super) type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Writing,
    Reading,
}

/// Who answers, as far as it tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cluster {
    pub(super) cockroach: bool,
    /// PostgreSQL's system identifier: copies of a cluster share it.
    pub(super) system: Option<String>,
    /// Raised whenever a standby is promoted.
    pub(super) timeline: Option<u32>,
}

/// One session. Its connection is closed when it is dropped: politely, or at once if anything may
/// still be running in it.
pub(super) struct Connection {
    client: Client,
    driver: AbortHandle,
    context: Arc<Context>,
    prepared: Mutex<HashMap<Query, Statement>>,
    // Statements that were begun and have not ended, those included whose waiting was given up.
    running: AtomicUsize,
    /// The opening of the store it belongs to.
    pub(super) generation: u64,
    pub(super) cluster: Cluster,
}

impl Connection {
    /// Begins a session, and finds out who answers.
    pub(super) async fn open(
        context: &Arc<Context>,
        purpose: Purpose,
        generation: u64,
        deadline: Instant,
    ) -> Result<Self, Failure> {
        let deadline = deadline.min(Instant::now() + context.options.connect_timeout);
        within(deadline, async {
            let mut connection = Self::connect(context, generation).await?;
            connection.introduce(purpose).await?;
            Ok(connection)
        })
        .await
    }

    async fn connect(context: &Arc<Context>, generation: u64) -> Result<Self, Failure> {
        let target = &context.target;
        let refused = |why| Failure::answer(StoreError::Refused(why));
        let config = target.config(&context.application(generation)).map_err(refused)?;
        let (client, driver) = match target.tls.clone() {
            None => {
                let (client, connection) = config.connect(NoTls).await?;
                (client, tokio::spawn(async { drop(connection.await) }))
            }
            Some(files) => {
                let tls = tokio::task::spawn_blocking(move || Tls::load(&files)).await;
                let tls = tls.unwrap_or_else(|_| Err("the certificates were not read".into()));
                let tls = tls.map_err(|why| Failure::answer(StoreError::Tls(why)))?;
                let (client, connection) = config.connect(tls).await?;
                (client, tokio::spawn(async { drop(connection.await) }))
            }
        };
        Ok(Self {
            client,
            driver: driver.abort_handle(),
            context: Arc::clone(context),
            prepared: Mutex::default(),
            running: AtomicUsize::new(0),
            generation,
            cluster: Cluster::default(),
        })
    }

    async fn introduce(&mut self, purpose: Purpose) -> Result<(), Failure> {
        let version = self.value("SELECT version()").await?.unwrap_or_default();
        self.cluster.cockroach = version.contains("CockroachDB");
        if !self.context.options.transaction_pooler {
            self.batch(&session(&self.context.options, purpose, self.cluster.cockroach)).await?;
        }
        if !self.cluster.cockroach {
            let (system, wal) = futures::join!(
                self.value("SELECT system_identifier FROM pg_catalog.pg_control_system()"),
                self.value(
                    "SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN \
                     pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()) END"
                ),
            );
            self.cluster.system = if_told(system)?;
            let timeline = if_told(wal)?;
            self.cluster.timeline =
                timeline.and_then(|name| u32::from_str_radix(name.get(..8)?, 16).ok());
        }
        Ok(())
    }

    /// Prepares what is sent in one go, which has to be prepared before.
    pub(super) async fn prepare_all(&self, purpose: Purpose) -> Result<(), Failure> {
        if self.context.options.transaction_pooler {
            return Ok(());
        }
        let queries: &[Query] = match purpose {
            Purpose::Writing => &Query::WRITING,
            Purpose::Reading => &Query::READING,
        };
        let prepared = queries.iter().map(|query| self.prepare(*query));
        futures::future::try_join_all(prepared).await.map(drop)
    }

    /// What this session's commits survive.
    pub(super) async fn durability(&self) -> Result<Durability, Failure> {
        if self.cluster.cockroach {
            return Ok(Durability::default());
        }
        let setting = |name| async move {
            let text = format!("SELECT setting FROM pg_catalog.pg_settings WHERE name = '{name}'");
            self.value(&text).await
        };
        let (synchronous_commit, fsync, full_page_writes, standbys) = futures::try_join!(
            setting("synchronous_commit"),
            setting("fsync"),
            setting("full_page_writes"),
            setting("synchronous_standby_names"),
        )?;
        let on = |value: Option<String>| value.map(|value| value == "on");
        Ok(Durability {
            synchronous_commit,
            fsync: on(fsync),
            full_page_writes: on(full_page_writes),
            synchronous_standby_names: standbys.filter(|names| !names.is_empty()),
        })
    }

    /// Ends the sessions of this store's earlier openings, in which a transaction may still wait.
    /// PostgreSQL only, and only to be faster: their own time-outs end them, too.
    pub(super) async fn end_earlier_sessions(&self) -> Result<(), Failure> {
        if self.cluster.cockroach || self.context.options.transaction_pooler {
            return Ok(());
        }
        let instance = &self.context.instance;
        let text = format!(
            "SELECT count(pg_catalog.pg_terminate_backend(pid)) FROM pg_catalog.pg_stat_activity \
             WHERE application_name LIKE 'polykey {instance}/%' \
             AND application_name <> 'polykey {instance}/{}' \
             AND pid <> pg_catalog.pg_backend_pid()",
            self.generation
        );
        if_told(self.value(&text).await).map(drop)
    }

    /// One value of one row, as text.
    pub(super) async fn value(&self, text: &str) -> Result<Option<String>, Failure> {
        let messages = self.run(self.client.simple_query(text)).await?;
        Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        }))
    }

    /// Prepares a statement, which makes the sending of it one step.
    pub(super) async fn prepare(&self, query: Query) -> Result<Statement, Failure> {
        if let Some(statement) = self.prepared.lock().get(&query) {
            return Ok(statement.clone());
        }
        let (text, types) = query.text(&self.context.options.quoted_schema());
        let statement = self.run(self.client.prepare_typed(&text, types)).await?;
        self.prepared.lock().insert(query, statement.clone());
        Ok(statement)
    }

    /// Runs a statement. It is sent when the future is first polled if it is prepared already.
    pub(super) async fn query(
        &self,
        query: Query,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, Failure> {
        #[cfg(feature = "conformance")]
        if self.context.faults.strikes() {
            return Err(self.fail().await);
        }
        self.read(query, parameters).await
    }

    /// As [`Self::query`], for statements in a transaction that cannot be begun again.
    pub(super) async fn read(
        &self,
        query: Query,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, Failure> {
        if self.context.options.transaction_pooler {
            let (text, types) = query.text(&self.context.options.quoted_schema());
            let typed: Vec<(&(dyn ToSql + Sync), Type)> =
                parameters.iter().copied().zip(types.iter().cloned()).collect();
            self.run(self.client.query_typed(&text, &typed)).await
        } else {
            let statement = self.prepare(query).await?;
            self.run(self.client.query(&statement, parameters)).await
        }
    }

    /// Runs text without parameters or results. It is sent when the future is first polled.
    pub(super) async fn batch(&self, text: &str) -> Result<(), Failure> {
        self.run(self.client.batch_execute(text)).await
    }

    /// Commits, or fails as the tests want it to.
    pub(super) async fn commit(&self) -> Result<(), Failure> {
        #[cfg(feature = "conformance")]
        if self.context.faults.strikes() {
            return Err(self.fail().await);
        }
        self.batch("COMMIT").await
    }

    // Has the server fail as if two transactions had met.
    #[cfg(feature = "conformance")]
    async fn fail(&self) -> Failure {
        match self.batch("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await {
            Err(failure) => failure,
            Ok(()) => Failure::damaged("a failure that did not fail"),
        }
    }

    /// What begins a transaction that writes.
    pub(super) fn begin_writing(&self) -> String {
        let settings = self.transaction_settings(self.context.options.call_timeout);
        // PostgreSQL looks at the data only after this: whoever queued sees what the one before has
        // written, in turn, instead of being rolled back. Readers do not wait.
        let queue = if self.cluster.cockroach {
            String::new()
        } else {
            let schema = self.context.options.quoted_schema();
            format!("; LOCK TABLE {schema}.head IN EXCLUSIVE MODE")
        };
        format!("BEGIN ISOLATION LEVEL SERIALIZABLE{settings}{queue}")
    }

    /// What begins a transaction that sees one revision.
    pub(super) fn begin_reading(&self) -> String {
        // CockroachDB has one level by default, and offers this one only where it is switched on.
        let level = if self.cluster.cockroach { "SERIALIZABLE" } else { "REPEATABLE READ" };
        let settings = self.transaction_settings(self.context.options.snapshot_life);
        format!("BEGIN ISOLATION LEVEL {level} READ ONLY{settings}")
    }

    // A pooler gives each transaction any session: what a session remembers elsewhere is said anew.
    fn transaction_settings(&self, idle: Duration) -> String {
        if !self.context.options.transaction_pooler {
            return String::new();
        }
        let (statement, idle) = (self.context.options.call_timeout.as_millis(), idle.as_millis());
        format!(
            "; SET LOCAL statement_timeout = {statement}; \
             SET LOCAL idle_in_transaction_session_timeout = {idle}"
        )
    }

    /// Whether it may serve once more: nothing is running in it.
    pub(super) fn is_usable(&self) -> bool {
        self.running.load(Ordering::Acquire) == 0 && !self.is_closed()
    }

    /// Whether the other side has closed it.
    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    // Whoever stops waiting leaves `running` as it is.
    async fn run<T>(
        &self,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Failure> {
        self.running.fetch_add(1, Ordering::AcqRel);
        let result = work.await;
        self.running.fetch_sub(1, Ordering::AcqRel);
        result.map_err(Failure::from)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.running.load(Ordering::Acquire) > 0 {
            self.driver.abort();
        }
    }
}

// None where this server does not know the question, or does not answer it to everybody.
fn if_told(answer: Result<Option<String>, Failure>) -> Result<Option<String>, Failure> {
    match answer {
        Err(failure) if failure.kind == Kind::Answer => Ok(None),
        other => other,
    }
}

// What a session is told once.
fn session(options: &Options, purpose: Purpose, cockroach: bool) -> String {
    let idle = match purpose {
        Purpose::Writing => options.call_timeout,
        Purpose::Reading => options.snapshot_life,
    };
    let mut text = format!(
        "SET statement_timeout = {}; SET idle_in_transaction_session_timeout = {}",
        options.call_timeout.as_millis(),
        idle.as_millis()
    );
    if !cockroach {
        // Every row is found by its primary key; no plan is to depend on statistics, which are those
        // of an empty table for a while.
        text.push_str(
            "; SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; \
             SET plan_cache_mode = force_generic_plan; SET jit = off",
        );
    }
    text
}
