//! sslmode, against a server with a certificate of a private authority.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod target;

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use target::Target;
use wallaby_connector_api::conformance::EmptySource;
use wallaby_connector_api::{SinkError, SinkFactory, SinkTask};
use wallaby_model::Epoch;
use wallaby_model::flow::{PostgresSinkSpec, SecretRef, SinkMode};
use wallaby_postgres::{PostgresSinkConfig, PostgresSinkFactory};
use wallaby_testkit::{Database, Postgres, PostgresOptions, TlsIdentity};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_sslmode_means_what_libpq_means() {
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(rcgen::DnType::CommonName, "the test's authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    // The server's certificate is for a name that is not the one we connect to.
    let certificate = CertificateParams::new(vec!["db.example".to_owned()]).unwrap();
    let certificate = certificate.signed_by(&key, &authority).unwrap();
    let identity = TlsIdentity { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() };
    let server = Postgres::start(PostgresOptions { tls: Some(identity), ..Default::default() }).await.unwrap();
    let database = Database::create_on(&server, "tls").await;
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("ca.pem");
    std::fs::write(&root, authority.pem()).unwrap();
    let task = Target::fresh("tls_task").await.task;

    let open = async |parameters: &str| {
        let dsn = format!("{}?{parameters}", database.dsn());
        let spec =
            PostgresSinkSpec { dsn: SecretRef::Value(String::new()), schema: "s".into(), mode: SinkMode::Upsert };
        let factory = PostgresSinkFactory::new(PostgresSinkConfig::new(&dsn, &spec)?);
        let mut sink = factory.make(SinkTask { task: task.clone(), since: Epoch(0), lookup: Arc::new(EmptySource) });
        sink.open(Epoch(1)).await?;
        let query =
            "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name LIKE 'wallaby/%'";
        let encrypted: bool = database.query_one(query, &[]).await.unwrap().get(0);
        sink.close().await;
        wallaby_testkit::eventually(std::time::Duration::from_secs(10), "the session ends", async || {
            let left = database.query(query, &[]).await.unwrap().len();
            if left == 0 { Ok(()) } else { Err(left) }
        })
        .await;
        Ok::<bool, SinkError>(encrypted)
    };
    let root = root.display();
    assert!(!open("sslmode=disable").await.unwrap());
    assert!(open("sslmode=prefer").await.unwrap());
    assert!(open("sslmode=require").await.unwrap());
    assert!(open(&format!("sslmode=verify-ca&sslrootcert={root}")).await.unwrap());
    // A chain that is right, for another host.
    assert!(open(&format!("sslmode=verify-full&sslrootcert={root}")).await.is_err());
    // The platform does not know our authority; and `require` with a root looks at the chain, as libpq does.
    assert!(open("sslmode=verify-ca&sslrootcert=system").await.is_err());
    assert!(open(&format!("sslmode=require&sslrootcert={root}.missing")).await.is_err());
}
