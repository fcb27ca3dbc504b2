//! A stream, and owners that write to it through the real chain.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use tokio::time::Instant;
use wallaby_model::{Codec, Epoch, FlowId, Lsn, Nonce, Position, Record, RecordKind, ResumeInfo};
use wallaby_staging::chain::{Append, Chain, LogView, Window};
use wallaby_staging::record::Link;
use wallaby_staging::tail::{ChainRun, FenceAt, TailWalk};
use wallaby_staging::{Incarnation, Staged, Tail};

const TIMEOUT: Duration = Duration::from_secs(2);

pub fn at(number: u64) -> Position {
    Position::before(Lsn(number))
}

pub fn number(position: Position) -> u64 {
    position.commit.0
}

/// A message on its way.
struct Flying {
    owner: usize,
    token: u64,
    expected: u64,
    link: Link,
    append: Append,
}

struct Owner {
    epoch: u64,
    nonce: Nonce,
    chain: Chain,
    /// What it handed in ends here.
    end: u64,
    incarnation: Incarnation,
    is_over: bool,
}

pub struct World {
    pub stream: Vec<Staged>,
    /// The sequence before `stream[0]`.
    last_sequence: u64,
    owners: Vec<Owner>,
    flying: VecDeque<Flying>,
    epoch: u64,
    /// The highest position that an owner was told is stored.
    pub acknowledged: u64,
    now: Instant,
    raw_link: Link,
}

impl Default for World {
    fn default() -> World {
        World {
            stream: Vec::new(),
            last_sequence: 0,
            owners: Vec::new(),
            flying: VecDeque::new(),
            epoch: 0,
            acknowledged: 0,
            now: Instant::now(),
            raw_link: Link::first(),
        }
    }
}

impl World {
    fn record(epoch: u64, kind: RecordKind) -> Record {
        Record { flow: FlowId::new("shop").unwrap(), epoch: Epoch(epoch), kind }
    }

    fn store(&mut self, record: Record, incarnation: Option<Incarnation>, link: Option<Link>) -> u64 {
        self.last_sequence += 1;
        let (sequence, traceparent, body) = (self.last_sequence, None, Bytes::new());
        self.stream.push(Staged { sequence, incarnation, link, traceparent, record, body });
        self.last_sequence
    }

    fn fences(&self) -> Vec<FenceAt> {
        let fence = |staged: &Staged| match staged.record.kind {
            RecordKind::Fence { nonce } => {
                Some(FenceAt { sequence: staged.sequence, epoch: staged.record.epoch, nonce })
            }
            _ => None,
        };
        self.stream.iter().filter_map(fence).collect()
    }

    pub fn tail(&self) -> Tail {
        let fences = self.fences();
        let mut walk = TailWalk::new(&fences);
        for staged in self.stream.iter().rev() {
            if !walk.push(staged.clone()) {
                break;
            }
        }
        walk.finish(self.last_sequence).unwrap_or_else(|gap| panic!("{gap:?}\n{}", self.trace()))
    }

    /// The stream, one record per line, for failures.
    pub fn trace(&self) -> String {
        let line = |staged: &Staged| {
            let what = match &staged.record.kind {
                RecordKind::Fence { .. } => "fence".to_owned(),
                RecordKind::Resume { position, .. } => format!("resume {}", number(*position)),
                RecordKind::Data { from, to, .. } => format!("{}..{}", number(*from), number(*to)),
                RecordKind::Splice { from, to } => format!("splice {}..{}", number(*from), number(*to)),
                RecordKind::Heartbeat { to, .. } => format!("heartbeat {}", number(*to)),
            };
            let link = staged.link.map_or(String::new(), |link| format!("{:04x}-{}", link.chain >> 48, link.index));
            format!("{} {} {what} {link}", staged.sequence, staged.record.epoch)
        };
        self.stream.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// All that retention may remove when every reader stands at the log's end.
    pub fn purge_all(&mut self) {
        let end = self.tail().end;
        let holds = self.stream.iter().position(|staged| staged.record.kind.to() > end);
        let before = &self.stream[..holds.unwrap_or(self.stream.len())];
        let mut run = ChainRun::default();
        let keep = before.iter().rposition(|staged| match holds {
            Some(_) => run.push(staged.link),
            None => staged.record.kind.to().is_some(),
        });
        self.stream.drain(..keep.unwrap_or(0));
    }

    pub fn raw_owner(&mut self, epoch: u64, position: u64, rewind: bool) {
        self.last_sequence = self.stream.last().map_or(self.last_sequence, |last| last.sequence);
        self.store(Self::record(epoch, RecordKind::Fence { nonce: Nonce::random() }), None, None);
        let kind = resume(position, rewind);
        let incarnation = if rewind { Some(Incarnation::random()) } else { self.newest_incarnation() };
        self.raw_link = Link::first();
        self.store(Self::record(epoch, kind), incarnation.or(Some(Incarnation(1))), Some(self.raw_link));
    }

    pub fn raw_data(&mut self, epoch: u64, from: u64, to: u64) {
        let incarnation = self.newest_incarnation();
        self.raw_link = self.raw_link.next();
        self.store(Self::record(epoch, data(from, to)), incarnation, Some(self.raw_link));
    }

    fn newest_incarnation(&self) -> Option<Incarnation> {
        self.stream.iter().rev().find_map(|staged| staged.incarnation)
    }

    /// One random thing happens.
    pub fn step(&mut self, kind: u8, dice: u16) {
        let dice = usize::from(dice);
        match kind {
            // A takeover, a third of them late, by an owner whose epoch is not the highest.
            0 => {
                let late = dice.is_multiple_of(3) && self.epoch > 2;
                let epoch = if late { self.epoch - 1 } else { self.epoch + 1 };
                self.epoch = self.epoch.max(epoch);
                self.take_over(epoch);
            }
            1..=4 => self.hand_in(dice),
            // A message arrives; now and then not the oldest, one is refused by chance, or its answer is lost.
            5..=8 => self.arrive(dice),
            9 => {
                // Time passes; late messages stay on their way.
                self.now += TIMEOUT / 2;
            }
            _ => self.tend(dice),
        }
    }

    /// Every owner gets what it waits for.
    pub fn finish(&mut self) {
        for round in 0..200 {
            while !self.flying.is_empty() {
                self.arrive(8);
            }
            self.now += TIMEOUT;
            for owner in 0..self.owners.len() {
                self.tend(owner);
            }
            if round > 100 && self.flying.is_empty() {
                break;
            }
        }
    }

    fn take_over(&mut self, epoch: u64) {
        let nonce = Nonce::random();
        self.store(Self::record(epoch, RecordKind::Fence { nonce }), None, None);
        if self.is_beaten(epoch, nonce) {
            return;
        }
        let tail = self.tail();
        let end = tail.end.map_or(1, number);
        let incarnation = tail.incarnation.unwrap_or(Incarnation(1));
        let mut chain = Chain::new(Window { count: 8, bytes: 1 << 20 }, tail.last_sequence, tail.end);
        chain.push(append(Self::record(epoch, resume(end, false))));
        self.owners.push(Owner { epoch, nonce, chain, end, incarnation, is_over: false });
    }

    fn is_beaten(&self, epoch: u64, nonce: Nonce) -> bool {
        let fences = self.fences();
        let first = fences.iter().find(|fence| fence.epoch == Epoch(epoch));
        fences.iter().any(|fence| fence.epoch > Epoch(epoch)) || first.is_some_and(|first| first.nonce != nonce)
    }

    fn hand_in(&mut self, dice: usize) {
        let count = self.owners.len();
        if count == 0 {
            return;
        }
        // Mostly the newest; sometimes one that should have stopped long ago.
        let owner = if dice.is_multiple_of(4) { dice / 4 % count } else { count - 1 };
        if self.owners[owner].is_over {
            return;
        }
        let length = 1 + (dice as u64 / 7) % 5;
        if self.owners[owner].chain.has_room() {
            let (epoch, end) = (self.owners[owner].epoch, self.owners[owner].end);
            self.owners[owner].chain.push(append(Self::record(epoch, data(end, end + length))));
            self.owners[owner].end += length;
        }
        self.send(owner);
    }

    fn send(&mut self, owner: usize) {
        let now = self.now;
        while let Some(send) = self.owners[owner].chain.next(now, TIMEOUT) {
            let (token, expected, link, append) = (send.token, send.expected, send.link, send.append.clone());
            self.flying.push_back(Flying { owner, token, expected, link, append });
        }
    }

    fn arrive(&mut self, dice: usize) {
        if self.flying.is_empty() {
            return;
        }
        // Most arrive in order; some are overtaken, also by those of other owners.
        let index = if dice.is_multiple_of(5) { dice / 5 % self.flying.len() } else { 0 };
        let Some(flying) = self.flying.remove(index) else { return };
        let is_lost = dice % 17 == 3;
        if is_lost {
            return;
        }
        let is_busy = dice % 13 == 2;
        let answer_is_lost = dice % 11 == 4;
        let fits = flying.expected == self.last_sequence && !is_busy;
        if fits {
            let incarnation = self.owners[flying.owner].incarnation;
            let sequence = self.store(flying.append.record, Some(incarnation), Some(flying.link));
            if !answer_is_lost {
                let stored = self.owners[flying.owner].chain.stored(flying.token, sequence);
                for stored in stored {
                    self.note_acknowledged(&stored.append);
                }
            }
        } else if !answer_is_lost {
            self.owners[flying.owner].chain.refused(flying.token);
        }
        self.send(flying.owner);
    }

    fn note_acknowledged(&mut self, append: &Append) {
        self.acknowledged = self.acknowledged.max(append.record.kind.to().map_or(0, number));
    }

    /// An owner looks after its chain: overdue answers, a resync.
    fn tend(&mut self, dice: usize) {
        let count = self.owners.len();
        if count == 0 {
            return;
        }
        let owner = dice % count;
        let now = self.now;
        self.owners[owner].chain.check_deadline(now);
        if self.owners[owner].is_over
            || !self.owners[owner].chain.is_broken()
            || !self.owners[owner].chain.is_settled(now)
        {
            self.send(owner);
            return;
        }
        if self.is_beaten(self.owners[owner].epoch, self.owners[owner].nonce) {
            self.owners[owner].is_over = true;
            return;
        }
        let tail = self.tail();
        let has_ours = tail.written_by == Some(Epoch(self.owners[owner].epoch));
        let view = LogView { last_sequence: tail.last_sequence, end: tail.end, has_ours };
        let found = self.owners[owner].chain.resynced(view).unwrap();
        for append in &found {
            self.note_acknowledged(append);
        }
        self.send(owner);
    }
}

fn resume(position: u64, rewind: bool) -> RecordKind {
    let text = String::new;
    let info = ResumeInfo { system_identifier: text(), timeline: 1, slot: text(), publication: text(), rewind };
    RecordKind::Resume { position: at(position), info }
}

fn data(from: u64, to: u64) -> RecordKind {
    RecordKind::Data { from: at(from), to: at(to), complete_to: at(to), rows: 1, codec: Codec::None }
}

fn append(record: Record) -> Append {
    let span = tracing::Span::none();
    Append { record, headers: HeaderMap::new(), body: Bytes::new(), stored_bytes: 100, span }
}
