//! An etcd that asks for name and password, and one that speaks TLS.

use std::time::Duration;

use clap::{Args, FromArgMatches};
use wallaby_coordination::{Coordination, Error, EtcdArguments, Options, WatchEvent};
use wallaby_testkit::{Folder, PortLease, Process, ProcessSpec, Toolbox, eventually};

use crate::setup::*;

/// Everything that takes another path through the client: a request, a lease, a watch.
async fn works(coordination: &Coordination) {
    let (flow, task) = shop(coordination).await;
    let mut watch = coordination.watch(coordination.keys().flows());
    assert!(matches!(watch.next().await, Some(WatchEvent::Snapshot { .. })));
    coordination.resume_flow(&flow).await.unwrap();
    assert!(matches!(watch.next().await, Some(WatchEvent::Changes(_))));
    let session = worker(coordination, "w1", lease(3, true)).await;
    let flow = coordination.flow(&flow.flow).await.unwrap();
    let _lock = take(&session, &task, flow.revision).await;
    let before = session.validity().deadline().unwrap();
    eventually(PATIENCE, "a keepalive is answered", async || {
        let deadline = session.validity().deadline().unwrap();
        if deadline > before { Ok(()) } else { Err(session.fence_reason()) }
    })
    .await;
}

/// What a program is told on its command line.
fn told(arguments: &[&str]) -> EtcdArguments {
    let all = ["program"].iter().chain(arguments);
    let matches = EtcdArguments::augment_args(clap::Command::new("program")).get_matches_from(all);
    EtcdArguments::from_arg_matches(&matches).unwrap()
}

#[test]
fn what_cannot_be_used_is_named() {
    let none = told(&["--etcd-ca", "/nowhere/ca.pem", "--etcd", "https://a:1"]).options().unwrap_err().to_string();
    assert!(none.contains("/nowhere/ca.pem"), "{none}");
    let plain = told(&["--etcd-ca", "/nowhere/ca.pem", "--etcd", "http://a:1"]).options().unwrap_err().to_string();
    assert!(plain.contains("http://a:1") && plain.contains("https://"), "{plain}");
}

#[tokio::test]
async fn a_password_is_asked_for() {
    let etcd = own_etcd(1).await;
    let mut admin = etcd_client::Client::connect(etcd.endpoints(), None).await.unwrap();
    admin.user_add("root", "right", None).await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();
    let with = |user: Option<(&str, &str)>| Options {
        user: user.map(|(name, password)| (name.to_owned(), password.to_owned())),
        connect_timeout: Duration::from_secs(3),
        ..options("/wallaby")
    };
    for wrong in [None, Some(("root", "wrong")), Some(("nobody", "right"))] {
        let error = Coordination::connect(&etcd.endpoints(), with(wrong)).await.unwrap_err();
        println!("{error}");
        assert!(matches!(error, Error::Settings(_)) && error.to_string().contains("password for it"), "{error:?}");
        assert!(!format!("{error} {error:?}").contains("wrong"), "a password in a message");
    }
    let folder = Folder::temporary("password").unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, "right\n").unwrap();
    let endpoints = etcd.endpoints().join(",");
    let right =
        told(&["--etcd", &endpoints, "--etcd-user", "root", "--etcd-password-file", &file.display().to_string()]);
    let right = right.options().unwrap();
    assert!(!format!("{right:?}").contains("right"), "a password in a debug print");
    works(&Coordination::connect(&etcd.endpoints(), right).await.unwrap()).await;

    let inline = Coordination::connect(&["http://root:right@127.0.0.1:1"], options("/wallaby")).await.unwrap_err();
    assert!(matches!(inline, Error::Settings(_)) && !inline.to_string().contains("right"), "{inline}");
}

#[tokio::test]
async fn tls_is_spoken_on_both_sides_and_a_foreign_authority_refused() {
    let folder = Folder::temporary("tls").unwrap();
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let foreign = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let ours = rcgen::generate_simple_self_signed(["wallaby".to_owned()]).unwrap();
    let write = |name: &str, pem: String| {
        let file = folder.path().join(name);
        std::fs::write(&file, pem).unwrap();
        file
    };
    let (certificate, key) = (write("cert.pem", own.cert.pem()), write("key.pem", own.signing_key.serialize_pem()));
    // What signed itself is its own authority.
    let (authority, our_key) =
        (write("ours.pem", ours.cert.pem()), write("ours.key", ours.signing_key.serialize_pem()));
    let foreign = write("foreign.pem", foreign.cert.pem());
    let (client, peer) = (PortLease::free().unwrap(), PortLease::free().unwrap());
    let (client_url, peer_url) =
        (format!("https://localhost:{}", client.port()), format!("http://127.0.0.1:{}", peer.port()));
    let listen = format!("https://127.0.0.1:{}", client.port());
    let path = |path: &std::path::Path| path.display().to_string();
    let arguments = [
        ("--name", "tls".to_owned()),
        ("--data-dir", path(&folder.path().join("data"))),
        ("--listen-client-urls", listen),
        ("--advertise-client-urls", client_url.clone()),
        ("--listen-peer-urls", peer_url.clone()),
        ("--initial-advertise-peer-urls", peer_url.clone()),
        ("--initial-cluster", format!("tls={peer_url}")),
        ("--cert-file", path(&certificate)),
        ("--key-file", path(&key)),
        ("--trusted-ca-file", path(&authority)),
        ("--client-cert-auth", "true".to_owned()),
        ("--enable-grpc-gateway", "false".to_owned()),
        ("--log-level", "warn".to_owned()),
    ];
    let arguments = arguments.into_iter().map(|(flag, value)| format!("{flag}={value}"));
    let binary = Toolbox::find().unwrap().etcd().unwrap();
    let _etcd = Process::spawn(&ProcessSpec::new("etcd-tls", binary, folder.path()).args(arguments)).unwrap();

    let telling = async |authority: &std::path::Path, is_shown: bool| {
        let mut arguments = vec!["--etcd".to_owned(), client_url.clone(), "--etcd-ca".to_owned(), path(authority)];
        if is_shown {
            let certificate = path(&folder.path().join("ours.pem"));
            arguments.extend(["--etcd-cert".to_owned(), certificate, "--etcd-key".to_owned(), path(&our_key)]);
        }
        let told = told(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let options = Options { connect_timeout: Duration::from_secs(2), ..told.options().unwrap() };
        Coordination::connect(&told.endpoints, options).await
    };
    let coordination = eventually(PATIENCE, "etcd answers over TLS", async || telling(&certificate, true).await).await;
    works(&coordination).await;
    let error = telling(&foreign, true).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, Error::Unreachable { .. }));
    assert!(error.to_string().contains("certificate"), "{error}");
    let error = telling(&certificate, false).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, Error::Unreachable { .. }));
}
