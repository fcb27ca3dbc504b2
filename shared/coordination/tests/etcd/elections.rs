//! Which controller replica schedules.

use std::time::{Duration, Instant};

use wallaby_coordination::{Candidate, Coordination, Election, Leadership, Options};
use wallaby_testkit::eventually;

use crate::setup::*;

const TTL: Duration = Duration::from_secs(2);

fn candidate(name: &str) -> Candidate {
    Candidate { id: name.to_owned(), address: format!("{name}:7117") }
}

async fn leads(election: &Election) {
    eventually(PATIENCE, "it leads", async || if election.is_leader() { Ok(()) } else { Err(election.current()) })
        .await;
}

async fn follows(election: &Election, leader: &str) {
    let wanted = Leadership::Follower(Some(candidate(leader)));
    eventually(PATIENCE, "it follows", async || {
        let now = election.current();
        if now == wanted { Ok(()) } else { Err(now) }
    })
    .await;
}

#[tokio::test]
async fn a_leader_that_resigns_is_followed_at_once() {
    let (_scope, coordination) = shared("resign").await;
    let first = coordination.campaign(candidate("c1"), TTL);
    leads(&first).await;
    let second = coordination.campaign(candidate("c2"), TTL);
    follows(&second, "c1").await;
    assert!(first.is_leader() && !second.is_leader());
    let began = Instant::now();
    first.resign().await;
    leads(&second).await;
    println!("followed after {:?}", began.elapsed());
    let third = coordination.campaign(candidate("c1"), TTL);
    follows(&third, "c2").await;
}

#[tokio::test]
async fn a_dead_leader_is_followed_after_its_lease() {
    let (scope, coordination) = shared("dead").await;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (endpoints, own): (Vec<String>, Options) = (scope.endpoints(), options(scope.prefix()));
    runtime
        .spawn(async move {
            let coordination = Coordination::connect(&endpoints, own).await.unwrap();
            let election = coordination.campaign(candidate("c1"), TTL);
            let mut changes = election.changes();
            changes.wait_for(|now| *now == Leadership::Leader).await.unwrap();
            drop(changes);
            tokio::spawn(async move {
                let _standing = election;
                std::future::pending::<()>().await;
            });
        })
        .await
        .unwrap();
    let second = coordination.campaign(candidate("c2"), TTL);
    follows(&second, "c1").await;
    runtime.shutdown_background();
    leads(&second).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_from_etcd_steps_back_and_stands_again() {
    let etcd = own_etcd(1).await;
    let coordination = connect_to(&etcd).await;
    let election = coordination.campaign(candidate("c1"), TTL);
    leads(&election).await;
    etcd.member(0).unwrap().pause().await.unwrap();
    eventually(PATIENCE, "it steps back", async || if election.is_leader() { Err("leads") } else { Ok(()) }).await;
    etcd.member(0).unwrap().resume().unwrap();
    leads(&election).await;
}
