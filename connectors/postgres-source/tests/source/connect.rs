//! Every way to connect, for both connections alike.

use std::collections::BTreeSet;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SignatureAlgorithm};
use wallaby_postgres_dsn::TlsSettings;
use wallaby_postgres_source::{ConfigError, ConnectConfig, ReplicationClient, SourceError, connect_control};
use wallaby_testkit::{Database, Postgres, PostgresOptions, TlsIdentity};

/// A server whose certificate is for `localhost` alone, an authority that signed it, and one that did not.
struct Tls {
    postgres: Postgres,
    files: tempfile::TempDir,
}

fn authority(name: &str) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    (params, KeyPair::generate().unwrap())
}

async fn tls(algorithm: &'static SignatureAlgorithm) -> Tls {
    let files = tempfile::tempdir().unwrap();
    let (params, key) = authority("trusted");
    let trusted = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let (other_params, other_key) = authority("other");
    let other = other_params.self_signed(&other_key).unwrap();

    let server_key = KeyPair::generate_for(algorithm).unwrap();
    let server = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&server_key, &issuer).unwrap();
    let client_key = KeyPair::generate().unwrap();
    let mut client = CertificateParams::new(Vec::new()).unwrap();
    client.distinguished_name.push(DnType::CommonName, "by_cert");
    let client = client.signed_by(&client_key, &issuer).unwrap();
    let write = |name: &str, content: &str| std::fs::write(files.path().join(name), content).unwrap();
    write("ca.pem", &trusted.pem());
    write("other.pem", &other.pem());
    write("client.pem", &client.pem());
    write("client.key", &client_key.serialize_pem());

    let identity = TlsIdentity { certificate_pem: server.pem(), key_pem: server_key.serialize_pem() };
    let options = PostgresOptions { tls: Some(identity), ..Default::default() };
    let postgres = Postgres::start(options).await.unwrap();
    // The server may run as another user: the authority goes to where it can read.
    std::fs::write(postgres.data_folder().join("ca.crt"), trusted.pem()).unwrap();
    let admin = postgres.connect("postgres").await.unwrap();
    admin
        .batch_execute(
            "SET password_encryption = 'scram-sha-256';
             CREATE ROLE by_cert LOGIN REPLICATION; CREATE ROLE trusted LOGIN REPLICATION;
             CREATE ROLE in_clear LOGIN REPLICATION PASSWORD 'secret';
             CREATE ROLE plain_only LOGIN REPLICATION PASSWORD 'secret'; CREATE ROLE tls_only LOGIN REPLICATION PASSWORD 'secret';
             SET password_encryption = 'md5'; CREATE ROLE by_md5 LOGIN REPLICATION PASSWORD 'secret';",
        )
        .await
        .unwrap();
    std::fs::write(
        postgres.data_folder().join("pg_hba.conf"),
        "hostssl all by_cert all cert
         host all trusted all trust
         host all in_clear all password
         local all in_clear password
         host all by_md5 all md5
         hostnossl all plain_only all scram-sha-256
         hostssl all tls_only all scram-sha-256
         local all all trust
         host all postgres all scram-sha-256\n",
    )
    .unwrap();
    admin.batch_execute("ALTER SYSTEM SET ssl_ca_file = 'ca.crt'").await.unwrap();
    admin.query("SELECT pg_reload_conf()", &[]).await.unwrap();
    let tls = Tls { postgres, files };
    // The reload is asynchronous: wait until the new rules hold.
    wallaby_testkit::eventually(crate::kit::LIMIT, "the new pg_hba.conf holds", async || {
        tls.try_both("trusted", "", "sslmode=disable").await.map(|_| ())
    })
    .await;
    tls
}

impl Tls {
    fn config(&self, user: &str, password: &str, rest: &str) -> ConnectConfig {
        let folder = self.files.path().display();
        let rest = rest.replace("{}", &folder.to_string());
        let host = if rest.contains("host=") { "" } else { "host=localhost" };
        let password = if password.is_empty() { String::new() } else { format!("password={password}") };
        let dsn = format!("{host} port={} user={user} {password} dbname=postgres {rest}", self.postgres.port());
        ConnectConfig::parse(&dsn).unwrap()
    }

    /// Connects in both ways; returns whether TLS is used, as the server sees it.
    async fn try_both(&self, user: &str, password: &str, rest: &str) -> Result<bool, SourceError> {
        let config = self.config(user, password, rest);
        let control = connect_control(&config).await;
        let replication = ReplicationClient::connect(&config).await;
        match (control, replication) {
            (Ok(control), Ok(mut replication)) => {
                replication.identify_system().await?;
                let sql = "SELECT coalesce(bool_or(ssl), false), count(DISTINCT ssl) FROM pg_stat_ssl JOIN pg_stat_activity a USING (pid)
                           WHERE a.usename = current_user AND (pid = pg_backend_pid() OR backend_type = 'walsender')";
                let row = control.query_one(sql, &[]).await.unwrap();
                assert_eq!(row.get::<_, i64>(1), 1, "both connections are alike");
                Ok(row.get(0))
            }
            (Err(error), Err(other)) => {
                assert_eq!(error.reason(), other.reason(), "{error} / {other}");
                assert!(!error.to_string().contains("secret"), "{error}");
                Err(error)
            }
            (control, replication) => {
                panic!("{user} {rest}: they differ: {:?} {:?}", control.err(), replication.err())
            }
        }
    }

    async fn reason(&self, user: &str, password: &str, rest: &str) -> &'static str {
        let error = self.try_both(user, password, rest).await.unwrap_err();
        assert!(error.remedy().is_some(), "{error}");
        error.reason()
    }
}

#[tokio::test]
async fn every_sslmode_means_what_libpq_says() {
    let tls = tls(&rcgen::PKCS_ECDSA_P256_SHA256).await;
    let password = tls.postgres.password().to_owned();
    let uses_tls = async |rest: &str| tls.try_both("postgres", &password, rest).await.unwrap();
    assert!(!uses_tls("sslmode=disable").await);
    assert!(!uses_tls("sslmode=allow").await);
    assert!(uses_tls("").await, "prefer is the default");
    assert!(uses_tls("sslmode=require").await);
    assert!(uses_tls("sslmode=verify-ca sslrootcert={}/ca.pem").await);
    assert!(uses_tls("sslmode=verify-full sslrootcert={}/ca.pem").await);
    assert!(uses_tls("host=127.0.0.1 sslmode=verify-ca sslrootcert={}/ca.pem").await);
    let reason = async |rest: &str| tls.reason("postgres", &password, rest).await;
    assert_eq!(reason("host=127.0.0.1 sslmode=verify-full sslrootcert={}/ca.pem").await, "TlsFailed");
    assert_eq!(reason("sslmode=verify-ca sslrootcert={}/other.pem").await, "TlsFailed");
    assert_eq!(reason("sslmode=require sslrootcert={}/other.pem").await, "TlsFailed");
    assert_eq!(reason("sslmode=verify-full").await, "TlsFailed");
    assert_eq!(reason("sslmode=verify-ca sslrootcert={}/missing.pem").await, "TlsFailed");
    // pg_hba.conf decides which attempt of allow and prefer succeeds.
    assert!(tls.try_both("tls_only", "secret", "sslmode=allow").await.unwrap());
    assert!(!tls.try_both("plain_only", "secret", "sslmode=prefer").await.unwrap());
    assert_eq!(tls.reason("plain_only", "secret", "sslmode=require").await, "AuthenticationFailed");
}

/// Says this to every request for TLS, and closes.
async fn answers(answer: u8) -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 8];
            if stream.read_exact(&mut request).await.is_ok() {
                let _ = stream.write_all(&[answer]).await;
            }
        }
    });
    port
}

#[tokio::test]
async fn a_server_that_goes_away_while_it_is_connected_to_is_tried_again() {
    for (answer, reason, is_transient) in [
        (b'S', "SourceUnreachable", true),
        (b'E', "SourceUnreachable", true),
        (b'N', "TlsFailed", false),
        (b'H', "TlsFailed", false),
    ] {
        let port = answers(answer).await;
        let dsn = format!("host=127.0.0.1 port={port} user=u dbname=d sslmode=require");
        let config = ConnectConfig::parse(&dsn).unwrap();
        let control = connect_control(&config).await.err().unwrap();
        let replication = ReplicationClient::connect(&config).await.err().unwrap();
        for error in [control, replication] {
            let found = (error.reason(), error.is_transient());
            assert_eq!(found, (reason, is_transient), "{}: {error}", char::from(answer));
        }
    }
}

#[tokio::test]
async fn a_control_connection_outlives_the_idle_time_out_of_its_role() {
    let db = Database::create("idle").await;
    let user = format!("u_{}", db.name());
    db.batch_execute(&format!(
        "CREATE ROLE {user} LOGIN PASSWORD 'pw'; ALTER ROLE {user} SET idle_session_timeout = '500ms'"
    ))
    .await
    .unwrap();
    let port = db.postgres().port();
    let dsn = format!("host=127.0.0.1 port={port} user={user} password=pw dbname={} sslmode=disable", db.name());
    let control = connect_control(&ConnectConfig::parse(&dsn).unwrap()).await.unwrap();
    control.query("SELECT 1", &[]).await.unwrap();
    // Idle for less long than ours: once the server has ended it, ours has outlived the time-out.
    let (_other, connection) = tokio_postgres::connect(&dsn, tokio_postgres::NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    let ended = tokio::time::timeout(crate::kit::LIMIT, connection).await.expect("the time-out does not hold");
    assert_eq!(ended.unwrap().unwrap_err().code().unwrap().code(), "57P05");
    control.query("SELECT 1", &[]).await.unwrap_or_else(|error| panic!("it was ended: {error}"));
    drop(control);
    db.batch_execute(&format!("DROP ROLE {user}")).await.unwrap();
}

#[tokio::test]
async fn every_authentication_method_and_channel_binding() {
    let tls = tls(&rcgen::PKCS_ECDSA_P384_SHA384).await;
    let password = tls.postgres.password().to_owned();
    assert!(tls.try_both("postgres", &password, "sslmode=require channel_binding=require").await.unwrap());
    assert!(tls.try_both("postgres", &password, "sslmode=require channel_binding=disable").await.unwrap());
    let reason = async |user: &str, password: &str, rest: &str| tls.reason(user, password, rest).await;
    assert_eq!(reason("postgres", &password, "sslmode=allow channel_binding=require").await, "AuthenticationFailed");
    assert_eq!(reason("trusted", "", "sslmode=require channel_binding=require").await, "AuthenticationFailed");
    assert_eq!(reason("postgres", "wrong-secret", "").await, "AuthenticationFailed");
    assert_eq!(reason("postgres", "", "").await, "AuthenticationFailed");
    tls.try_both("by_md5", "secret", "").await.unwrap();
    tls.try_both("by_cert", "", "sslmode=require sslcert={}/client.pem sslkey={}/client.key").await.unwrap();
    assert_eq!(reason("by_cert", "", "sslmode=require").await, "AuthenticationFailed");
    // A password in clear goes over TLS and over a Unix socket, over an open wire only when that is asked for.
    tls.try_both("in_clear", "secret", "sslmode=require").await.unwrap();
    let socket = format!("host={}", tls.postgres.socket_folder().display());
    tls.try_both("in_clear", "secret", &socket).await.unwrap();
    let error = tls.try_both("in_clear", "secret", "sslmode=disable").await.unwrap_err();
    assert!(error.to_string().contains("clear text"), "{error}");
    assert_eq!(error.reason(), "AuthenticationFailed");
    tls.try_both("in_clear", "secret", "sslmode=disable allow_cleartext_password=true").await.unwrap();
    assert_eq!(reason("postgres", &password, "host=127.0.0.1 port=1 connect_timeout=2").await, "SourceUnreachable");
}

/// The page is of what is taken: a parameter that is taken is on it, and one that is on it is taken.
#[test]
fn the_page_has_every_parameter() {
    let page = include_str!("../../../../docs/operations.md");
    let (_, section) = page.split_once("### Connection strings\n").unwrap();
    let (table, sink) = section.split_once("\nA Postgres sink takes").unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `"));
    let names = rows.flat_map(|row| {
        let (cell, _) = row.split_once(" |").unwrap();
        cell.split(',').map(|name| name.trim().trim_matches('`')).collect::<Vec<_>>()
    });
    let names: BTreeSet<&str> = names.collect();
    let taken: BTreeSet<&str> = ConnectConfig::PARAMETERS.into_iter().chain(TlsSettings::PARAMETERS).collect();
    assert_eq!(names, taken);
    // A value that fits nothing is not what is looked at.
    let is_unknown = |name: &str| {
        let dsn = format!("host=h user=u {name}=nonsense");
        matches!(ConnectConfig::parse(&dsn), Err(ConfigError::Unknown(unknown)) if unknown == name)
    };
    assert!(names.iter().all(|name| !is_unknown(name)), "{names:?}");
    assert!(is_unknown("target_session_attrs") && sink.contains("`target_session_attrs`"));
}
