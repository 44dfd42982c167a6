//! Several servers on one PostgreSQL of the tests' own.

#[allow(dead_code, reason = "shared with the tests of the store")]
#[path = "../../storage/tests/postgres/server.rs"]
pub(crate) mod postgres;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::client::Client;
use super::gateway::Gateway;
use super::{Options, Server};

/// Servers that share a database.
pub(crate) struct Cluster {
    pub(crate) database: postgres::Server,
    /// Of each server to the database, if there are any.
    pub(crate) gateways: Vec<Gateway>,
    pub(crate) servers: Vec<Server>,
    directories: Vec<TempDir>,
}

fn in_database(text: &str, port: u16, password: &Path, more: &str) -> String {
    let section = format!(
        "kind = \"postgres\"\nurl = \"postgres://{}@127.0.0.1:{}/keys?sslmode=disable\"\n\
         password = {{ file = \"{}\" }}\n{more}",
        postgres::ROLE,
        port,
        password.display(),
    );
    text.replace("path = \"polykey.redb\"", &section)
}

fn copy_state(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o700)).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() && entry.file_name() != ".lock" {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

impl Cluster {
    /// Servers that reach the database as it is.
    pub(crate) fn start(nodes: usize, more: &str) -> Self {
        Self::with(nodes, more, Vec::new())
    }

    /// Servers that reach the database through a gateway each.
    pub(crate) fn behind_gateways(nodes: usize, more: &str) -> Self {
        Self::with(nodes, more, vec![Gateway::to(0)])
    }

    fn with(nodes: usize, more: &str, gateways: Vec<Gateway>) -> Self {
        let database = postgres::Server::start(&[]);
        for gateway in &gateways {
            gateway.lead_to(database.port);
        }
        let port = gateways.first().map_or(database.port, |gateway| gateway.port);
        let away = tempfile::tempdir().unwrap();
        let password = away.path().join("password");
        std::fs::write(&password, postgres::PASSWORD).unwrap();
        std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
        let first = Server::dev_configured(|text| in_database(&text, port, &password, more));
        let mut cluster =
            Self { database, gateways, servers: vec![first], directories: vec![away] };
        for _ in 1..nodes {
            cluster.join();
        }
        cluster
    }

    pub(crate) fn join(&mut self) {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        copy_state(&self.servers[0].state, &state);
        let config = state.join("polykey.toml");
        if let Some(of_first) = self.gateways.first() {
            let gateway = Gateway::to(self.database.port);
            let text = std::fs::read_to_string(&config).unwrap();
            let [from, to] = [of_first, &gateway].map(|gateway| format!(":{}/keys", gateway.port));
            std::fs::write(&config, text.replace(&from, &to)).unwrap();
            self.gateways.push(gateway);
        }
        let server = Server::serve(&state, &config.display().to_string(), &Options::default())
            .unwrap_or_else(|ended| panic!("{}", ended.output));
        self.servers.push(server);
        self.directories.push(directory);
    }

    /// Kills a server for good.
    pub(crate) fn lose(&mut self, index: usize) -> PathBuf {
        let server = self.servers.remove(index);
        let pid = rustix::process::Pid::from_raw(server.pid().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let state = server.state.clone();
        let kept = server.stop().2;
        self.directories.extend(kept);
        state
    }

    /// Kills a server, and starts another on its state.
    pub(crate) fn kill(&mut self, index: usize) {
        let state = self.lose(index);
        let config = state.join("polykey.toml").display().to_string();
        let server = Server::serve(&state, &config, &Options::default())
            .unwrap_or_else(|ended| panic!("{}", ended.output));
        self.servers.insert(index, server);
    }

    pub(crate) async fn admins(&self) -> Vec<Client> {
        let mut admins = Vec::new();
        for server in &self.servers {
            admins.push(server.admin().await);
        }
        admins
    }
}

/// The same caller at another server.
pub(crate) fn at(client: &Client, server: &Server) -> Client {
    let mut moved = Client::new(&server.address, client.files.clone(), &client.id, &client.api_key);
    moved.token.clone_from(&client.token);
    moved
}
