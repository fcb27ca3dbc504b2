//! An etcd that asks for name and password, and one that speaks TLS.

use std::time::Duration;

use wallaby_coordination::{Coordination, Error, Options, Tls, WatchEvent};
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
    let right = with(Some(("root", "right")));
    assert!(!format!("{right:?}").contains("right"), "a password in a debug print");
    works(&Coordination::connect(&etcd.endpoints(), right).await.unwrap()).await;

    let inline = Coordination::connect(&["http://root:right@127.0.0.1:1"], options("/wallaby")).await.unwrap_err();
    assert!(matches!(inline, Error::Settings(_)) && !inline.to_string().contains("right"), "{inline}");
}

#[tokio::test]
async fn tls_is_spoken_and_a_foreign_authority_refused() {
    let folder = Folder::temporary("tls").unwrap();
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let foreign = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&certificate, own.cert.pem()).unwrap();
    std::fs::write(&key, own.signing_key.serialize_pem()).unwrap();
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
        ("--log-level", "warn".to_owned()),
    ];
    let arguments = arguments.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
    let binary = Toolbox::find().unwrap().etcd().unwrap();
    let _etcd = Process::spawn(&ProcessSpec::new("etcd-tls", binary, folder.path()).args(arguments)).unwrap();

    let trusting = |pem: String| Options {
        tls: Some(Tls { ca_pem: Some(pem.into_bytes()), ..Tls::default() }),
        connect_timeout: Duration::from_secs(2),
        ..options("/wallaby")
    };
    let coordination = eventually(PATIENCE, "etcd answers over TLS", async || {
        Coordination::connect(std::slice::from_ref(&client_url), trusting(own.cert.pem())).await
    })
    .await;
    works(&coordination).await;
    let error = Coordination::connect(&[client_url], trusting(foreign.cert.pem())).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, Error::Unreachable { .. }));
    assert!(error.to_string().contains("certificate"), "{error}");
}
