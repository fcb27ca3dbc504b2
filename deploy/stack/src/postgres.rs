//! A PostgreSQL cluster of our own, made for logical decoding.

mod template;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use tokio_postgres::{Client, NoTls};

use crate::error::LogTail;
use crate::process::{Exit, ProcessSpec};
use crate::process_tree::{command_line, descendants};
use crate::server::Probe;
use crate::toolbox::POSTGRES_VERSION;
use crate::{Error, Folder, PortLease, Result, Server, Toolbox, nonce};

/// The name of the superuser.
const SUPERUSER: &str = "postgres";
/// How long a start may take: recovery after a kill, with fsync on, on a busy machine.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long an orderly shutdown may take before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// How many sets of ports are tried.
const PORT_TRIES: usize = 3;

/// How a cluster is set up. `PostgresOptions { fsync: true, ..Default::default() }`.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// A version in the tool cache, such as `18.4`.
    pub version: String,
    /// A folder with `postgres` and `initdb` to use instead of one in the tool cache.
    pub bin: Option<PathBuf>,
    /// A folder to keep the cluster in; a cluster that is there is started as it is. Without one it is temporary.
    pub folder: Option<PathBuf>,
    /// Where to listen on 127.0.0.1; without one, a free port.
    pub port: Option<u16>,
    /// Whether writes are flushed to disk. Off for tests that kill processes only; on where power is cut.
    pub fsync: bool,
    /// The superuser's password; without one, a random one.
    pub password: Option<String>,
    /// Lets the server speak TLS.
    pub tls: Option<TlsIdentity>,
    /// Any other settings, over our own. `ALTER SYSTEM` overrides all of them.
    pub settings: BTreeMap<String, String>,
}

/// A certificate chain and its private key, both PEM.
#[derive(Clone)]
pub struct TlsIdentity {
    /// The certificate, then its issuers.
    pub certificate_pem: String,
    /// The private key.
    pub key_pem: String,
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsIdentity(..)")
    }
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self {
            version: POSTGRES_VERSION.to_owned(),
            bin: None,
            folder: None,
            port: None,
            fsync: false,
            password: None,
            tls: None,
            settings: BTreeMap::new(),
        }
    }
}

impl PostgresOptions {
    /// With one more setting of `postgresql.conf`.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.insert(name.into(), value.into());
        self
    }
}

/// How to ask Postgres to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Waits until all sessions have ended (SIGTERM).
    Smart,
    /// Ends sessions, waits for walsenders to send the rest, writes a checkpoint (SIGINT).
    Fast,
    /// Ends at once; the next start recovers (SIGQUIT).
    Immediate,
}

/// A running (or stopped) Postgres cluster: `wal_level = logical`, SCRAM passwords, on 127.0.0.1 and on a Unix socket.
///
/// Dropping it kills it. The data goes too, unless the options named a folder.
#[derive(Debug)]
pub struct Postgres {
    // In this order: the processes must be gone before their folder is removed.
    server: Server,
    port: PortLease,
    identity: String,
    password: String,
    data: PathBuf,
    bin: PathBuf,
    folder: Folder,
}

impl Postgres {
    /// Starts a cluster and hands it out when it answers with its own identity.
    pub async fn start(options: PostgresOptions) -> Result<Self> {
        let toolbox = Toolbox::find()?;
        let bin = options.bin.clone().map_or_else(|| toolbox.postgres_bin(&options.version), Ok)?;
        let folder = Folder::open(options.folder.as_deref(), "postgres")?;
        let data = folder.path().join("data");
        let password_file = folder.path().join("password");
        let is_new = !data.join("PG_VERSION").exists();
        if is_new {
            let template = template::prepare(&toolbox, &bin).await?;
            template::copy(&template, &data).await?;
        }
        let password = match (&options.password, is_new) {
            (Some(password), _) => password.clone(),
            (None, false) => fs::read_to_string(&password_file).map_err(Error::at("reading", &password_file))?,
            (None, true) => nonce("secret"),
        };
        if let Some(tls) = &options.tls {
            write_private(&data.join("server.crt"), &tls.certificate_pem)?;
            write_private(&data.join("server.key"), &tls.key_pem)?;
        }
        let mut postgres = Self::prepare(&options, folder, data, bin, password)?;
        let mut tries = 1;
        while let Err(error) = postgres.start_with(if is_new { template::PASSWORD } else { &postgres.password }).await {
            if !matches!(error, Error::PortTaken { .. }) || options.port.is_some() || tries == PORT_TRIES {
                return Err(error);
            }
            tries += 1;
            let Self { folder, data, bin, password, .. } = postgres;
            postgres = Self::prepare(&options, folder, data, bin, password)?;
        }
        if is_new {
            postgres.set_password().await?;
            write_private(&password_file, &postgres.password)?;
        }
        Ok(postgres)
    }

    /// Chooses port and identity and writes the configuration.
    fn prepare(
        options: &PostgresOptions,
        folder: Folder,
        data: PathBuf,
        bin: PathBuf,
        password: String,
    ) -> Result<Self> {
        let port = options.port.map_or_else(PortLease::free, |port| Ok(PortLease::fixed(port)))?;
        let identity = nonce("postgres");
        let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
        let mut settings = BTreeMap::from([
            ("port".to_owned(), port.port().to_string()),
            ("listen_addresses".to_owned(), "127.0.0.1".to_owned()),
            ("unix_socket_directories".to_owned(), folder.path().display().to_string()),
            ("cluster_name".to_owned(), identity.clone()),
            ("wal_level".to_owned(), "logical".to_owned()),
            ("max_wal_senders".to_owned(), "40".to_owned()),
            ("max_replication_slots".to_owned(), "40".to_owned()),
            ("max_connections".to_owned(), "200".to_owned()),
            ("shared_buffers".to_owned(), "64MB".to_owned()),
            ("max_prepared_transactions".to_owned(), "10".to_owned()),
            ("fsync".to_owned(), on_off(options.fsync)),
            ("full_page_writes".to_owned(), on_off(options.fsync)),
            ("log_line_prefix".to_owned(), "%m [%p] %a %d ".to_owned()),
        ]);
        if options.tls.is_some() {
            settings.insert("ssl".to_owned(), "on".to_owned());
        }
        settings.extend(options.settings.clone());
        let mut text = String::new();
        for (name, value) in &settings {
            // Infallible: the target is a String.
            let _ = writeln!(text, "{name} = '{}'", value.replace('\'', "''"));
        }
        write_private(&data.join("wallaby.conf"), &text)?;
        let data_text = data.display().to_string();
        let mut spec = ProcessSpec::new("postgres", bin.join("postgres"), folder.path()).args(["-D", &data_text]);
        spec.refuses_root = true;
        // Immediate shutdown: the postmaster ends its backends and collects them.
        spec.end_signal = Some(Signal::QUIT);
        Ok(Self { server: Server::new(spec), port, identity, password, data, bin, folder })
    }

    /// Starts the cluster again after it was stopped or killed: same port, same data.
    pub async fn start_again(&self) -> Result<()> {
        self.start_with(&self.password).await
    }

    /// Stops it if it runs, and starts it again.
    pub async fn restart(&self, shutdown: Shutdown) -> Result<()> {
        if self.server.is_alive() {
            self.stop(shutdown).await?;
        }
        self.start_again().await
    }

    async fn start_with(&self, password: &str) -> Result<()> {
        self.server.launch()?;
        let ready = self.server.ready(START_PATIENCE, &[self.port()], || self.probe(password)).await;
        if ready.is_err() {
            // A server that is not handed out is not left running either.
            self.server.process()?.kill().await?;
        }
        ready
    }

    /// Whether it answers, with our identity.
    async fn probe(&self, password: &str) -> Result<(), Probe> {
        // Somebody else on the port would be asked for a login otherwise: our postmaster writes its state into our folder.
        let pid_file = fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        let status = pid_file.lines().nth(7).unwrap_or("no postmaster.pid yet").trim().to_owned();
        if status != "ready" {
            return Err(Probe::NotYet(status));
        }
        let client =
            open(&self.dsn_with(SUPERUSER, password)).await.map_err(|error| Probe::NotYet(format!("{error:?}")))?;
        let row =
            client.query_one("SHOW cluster_name", &[]).await.map_err(|error| Probe::NotYet(format!("{error:?}")))?;
        let found: String = row.try_get(0).map_err(|error| Probe::NotYet(format!("{error:?}")))?;
        if found == self.identity {
            return Ok(());
        }
        let address = format!("127.0.0.1:{}", self.port());
        Err(Probe::Never(Error::Impostor { address, expected: self.identity.clone(), found }))
    }

    async fn set_password(&self) -> Result<()> {
        let client = open(&self.dsn_with(SUPERUSER, template::PASSWORD)).await.map_err(query("connecting"))?;
        let sql = format!("ALTER ROLE {SUPERUSER} PASSWORD '{}'", self.password.replace('\'', "''"));
        client.batch_execute(&sql).await.map_err(query("setting the password"))
    }

    /// Ends it in an orderly way. Kills it when that takes more than a minute.
    pub async fn stop(&self, shutdown: Shutdown) -> Result<Exit> {
        let signal = match shutdown {
            Shutdown::Smart => Signal::TERM,
            Shutdown::Fast => Signal::INT,
            Shutdown::Immediate => Signal::QUIT,
        };
        self.server.stop_with(signal, STOP_PATIENCE).await
    }

    /// SIGKILL to the postmaster and all backends; returns when all are gone.
    pub async fn kill9(&self) -> Result<()> {
        self.server.kill9().await
    }

    /// SIGSTOP to the postmaster and all backends.
    pub async fn pause(&self) -> Result<()> {
        self.server.pause().await
    }

    /// Lets a paused cluster go on.
    pub fn resume(&self) -> Result<()> {
        self.server.resume()
    }

    /// Whether the postmaster runs.
    pub fn is_alive(&self) -> bool {
        self.server.is_alive()
    }

    /// A connection to a database as superuser; its task runs in the current runtime until the client is dropped.
    pub async fn connect(&self, database: &str) -> Result<Client> {
        open(&self.dsn(database)).await.map_err(query("connecting"))
    }

    /// A connection string of a database for the superuser: `postgres://postgres:<password>@127.0.0.1:<port>/<database>`.
    pub fn dsn(&self, database: &str) -> String {
        self.dsn_with(database, &self.password)
    }

    fn dsn_with(&self, database: &str, password: &str) -> String {
        format!("postgres://{SUPERUSER}:{}@127.0.0.1:{}/{}", percent(password), self.port(), percent(database))
    }

    /// The port on 127.0.0.1. It stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.port.port()
    }

    /// The superuser's password.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// The folder of its Unix socket.
    pub fn socket_folder(&self) -> &Path {
        self.folder.path()
    }

    /// The data folder.
    pub fn data_folder(&self) -> &Path {
        &self.data
    }

    /// The folder of `postgres`, `initdb`, `pg_ctl`.
    pub fn bin_folder(&self) -> &Path {
        &self.bin
    }

    /// The nonce in `cluster_name`.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The postmaster's process id; an error when it does not run.
    pub fn pid(&self) -> Result<i32> {
        self.server.pid()
    }

    /// The process ids of all walsenders, read from the process table: works also when no connection is to be had.
    pub fn walsender_pids(&self) -> Result<Vec<i32>> {
        let is_walsender = |pid: &i32| command_line(*pid).contains(" walsender ");
        Ok(descendants(self.pid()?).into_iter().map(|member| member.pid).filter(is_walsender).collect())
    }

    /// The last lines of its log.
    pub fn log_tail(&self, lines: usize) -> LogTail {
        self.server.log_tail(lines)
    }

    /// The process behind it.
    pub fn server(&self) -> &Server {
        &self.server
    }
}

async fn open(dsn: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(dsn, NoTls).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a local Postgres ended");
        }
    });
    Ok(client)
}

fn query(what: &'static str) -> impl FnOnce(tokio_postgres::Error) -> Error {
    move |source| Error::Query { what: what.to_owned(), source }
}

/// Writes a file that only we may read.
fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(Error::at("writing", path))
}

/// A part of a URL.
fn percent(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}
