//! One database for each test.

use std::ops::Deref;
use std::thread;

use tokio_postgres::Client;
use wallaby_stack::Postgres;

use crate::shared::{apart, postgres};
use crate::unique;

/// How many log lines a failing test prints.
const LOG_LINES: usize = 20;

/// A fresh database in a cluster, with a connection to it. Dropping it drops the database, with its slots and publications.
#[derive(Debug)]
pub struct Database<'p> {
    postgres: &'p Postgres,
    name: String,
    client: Client,
}

impl Database<'static> {
    /// A database in the shared cluster. The hint becomes a part of its name.
    pub async fn create(hint: &str) -> Self {
        Self::create_on(postgres(), hint).await
    }
}

impl<'p> Database<'p> {
    /// A database in a cluster of one's own.
    pub async fn create_on(postgres: &'p Postgres, hint: &str) -> Self {
        let name = unique(hint);
        let admin =
            postgres.connect("postgres").await.unwrap_or_else(|error| panic!("no connection to Postgres: {error}"));
        let made = admin.batch_execute(&format!("CREATE DATABASE {name}")).await;
        made.unwrap_or_else(|error| panic!("creating database {name}: {error:?}"));
        let client =
            postgres.connect(&name).await.unwrap_or_else(|error| panic!("no connection to database {name}: {error}"));
        Self { postgres, name, client }
    }

    /// The connection that came with it, as superuser.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// One more connection.
    pub async fn connect(&self) -> Client {
        self.postgres
            .connect(&self.name)
            .await
            .unwrap_or_else(|error| panic!("no connection to database {}: {error}", self.name))
    }

    /// `postgres://postgres:<password>@127.0.0.1:<port>/<name>`.
    pub fn dsn(&self) -> String {
        self.postgres.dsn(&self.name)
    }

    /// Its name, also fit for a slot or a publication.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cluster it is in.
    pub fn postgres(&self) -> &'p Postgres {
        self.postgres
    }
}

impl Deref for Database<'_> {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Database<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("postgres{}", self.postgres.log_tail(LOG_LINES));
            // What the test saw may be of use to a person with a debugger; the cluster goes with the binary anyway.
            return;
        }
        if self.postgres.is_alive() {
            apart(|| async {
                if let Err(error) = remove(self.postgres, &self.name).await {
                    eprintln!("database {} was not dropped: {error:?}", self.name);
                }
                Ok::<_, String>(())
            });
        }
    }
}

/// Ends what uses the database's slots, drops them (`DROP DATABASE` refuses while there are any), then drops it.
async fn remove(postgres: &Postgres, name: &str) -> Result<(), tokio_postgres::Error> {
    let Ok(admin) = postgres.connect("postgres").await else { return Ok(()) };
    // A walsender that is told to end holds its slot a moment longer, so the slots are asked for until none is left.
    const SLOTS: &str = "DO $$
        DECLARE slot record; tries int := 0;
        BEGIN
          LOOP
            PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = '{name}' AND active_pid IS NOT NULL;
            FOR slot IN SELECT slot_name FROM pg_replication_slots WHERE database = '{name}' AND active_pid IS NULL LOOP
              PERFORM pg_drop_replication_slot(slot.slot_name);
            END LOOP;
            tries := tries + 1;
            EXIT WHEN tries > 100 OR NOT EXISTS (SELECT FROM pg_replication_slots WHERE database = '{name}');
            PERFORM pg_sleep(0.02);
          END LOOP;
        END $$";
    admin.batch_execute(&SLOTS.replace("{name}", name)).await?;
    admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await
}
