//! Every key of the flow file: its shape, whether it must be there, its default, and a sentence about it.
//!
//! One table for two uses, so that they cannot disagree: the parser checks a file against it, and the docs page is printed
//! from it. A test compares it with the types.

/// The shape of a value.
#[derive(Debug)]
pub enum Shape {
    /// A map with the keys of an object.
    Object(&'static Object),
    /// A list of one shape.
    List(&'static Shape),
    /// A map of free keys to texts.
    Labels,
    /// Any text.
    Text,
    /// A name as flows and sinks have: it ends up in keys, subjects and slot names.
    Name,
    /// `true` or `false`.
    Bool,
    /// A number of bytes.
    Size,
    /// A length of time.
    Span,
    /// One of some words.
    Choice(&'static [Choice]),
}

impl Shape {
    /// What people call it.
    pub fn title(&self) -> String {
        match self {
            Shape::Object(object) if object.one_of => "one of its keys".to_owned(),
            Shape::Object(_) => "map".to_owned(),
            Shape::List(Shape::Text) => "list of texts".to_owned(),
            Shape::List(_) => "list of maps".to_owned(),
            Shape::Labels => "map of texts".to_owned(),
            Shape::Text => "text".to_owned(),
            Shape::Name => "name".to_owned(),
            Shape::Bool => "true or false".to_owned(),
            Shape::Size => "size".to_owned(),
            Shape::Span => "time".to_owned(),
            Shape::Choice(choices) => {
                let usable = choices.iter().filter(|choice| choice.not_yet.is_none());
                usable.map(|choice| format!("`{}`", choice.text)).collect::<Vec<_>>().join(", ")
            }
        }
    }
}

/// One of some words.
#[derive(Debug)]
pub struct Choice {
    /// The word.
    pub text: &'static str,
    /// Why it cannot be chosen yet; none when it can.
    pub not_yet: Option<&'static str>,
    /// What it means.
    pub doc: &'static str,
}

/// A map with known keys.
#[derive(Debug)]
pub struct Object {
    /// Its keys.
    pub fields: &'static [Field],
    /// Exactly one of the keys must be there.
    pub one_of: bool,
    /// Holds a secret: its values are never repeated in a message.
    pub secret: bool,
}

/// One key.
#[derive(Debug)]
pub struct Field {
    /// The key.
    pub key: &'static str,
    /// The shape of its value.
    pub shape: Shape,
    /// Whether it must be there.
    pub required: bool,
    /// What counts when it is absent.
    pub default: &'static str,
    /// Why it cannot be used yet; none when it can.
    pub not_yet: Option<&'static str>,
    /// Written by us, ignored when read, so that what was printed can be applied again.
    pub ignored: bool,
    /// What it means.
    pub doc: &'static str,
}

const fn must(key: &'static str, shape: Shape, doc: &'static str) -> Field {
    Field { key, shape, required: true, default: "", not_yet: None, ignored: false, doc }
}

const fn may(key: &'static str, shape: Shape, default: &'static str, doc: &'static str) -> Field {
    Field { key, shape, required: false, default, not_yet: None, ignored: false, doc }
}

const fn later(key: &'static str, why: &'static str) -> Field {
    Field { key, shape: Shape::Text, required: false, default: "", not_yet: Some(why), ignored: false, doc: why }
}

const fn pick(text: &'static str, doc: &'static str) -> Choice {
    Choice { text, not_yet: None, doc }
}

const fn not_yet(text: &'static str, why: &'static str) -> Choice {
    Choice { text, not_yet: Some(why), doc: why }
}

const fn object(fields: &'static [Field]) -> Object {
    Object { fields, one_of: false, secret: false }
}

/// The whole document.
pub static DOCUMENT: Object = object(&[
    must("apiVersion", Shape::Choice(&[pick("wallaby/v1", "the only version")]), "The version of this format."),
    must("kind", Shape::Choice(&[pick("Flow", "the only kind")]), "What the document describes."),
    must("metadata", Shape::Object(&METADATA), "Name and labels."),
    must("spec", Shape::Object(&SPEC), "What the flow should do."),
    Field {
        key: "status",
        shape: Shape::Labels,
        required: false,
        default: "",
        not_yet: None,
        ignored: true,
        doc: "What is. Written by `wallaby get -o yaml`, ignored when read.",
    },
]);

static METADATA: Object = object(&[
    must("name", Shape::Name, "The flow's name. It ends up in the slot's and the log's names and cannot change."),
    may("labels", Shape::Labels, "none", "Free labels, for people and for selecting."),
]);

static SPEC: Object = object(&[
    must("source", Shape::Object(&SOURCE), "Where changes come from."),
    may("log", Shape::Object(&LOG), "all defaults", "The staged log between the source and the sinks."),
    must("sinks", Shape::List(&Shape::Object(&SINK)), "Where changes go: at least one sink."),
    later("streams", "streams for programs that pull come with a later version: remove `streams`"),
    may(
        "paused",
        Shape::Bool,
        "false",
        "Stops every task of the flow and keeps slot, log and positions. The slot then holds WAL back at the source. \
         `wallaby apply` leaves a paused flow paused when the file does not say.",
    ),
]);

static SOURCE: Object = Object {
    fields: &[must("postgres", Shape::Object(&POSTGRES_SOURCE), "A PostgreSQL database.")],
    one_of: true,
    secret: false,
};

static POSTGRES_SOURCE: Object = object(&[
    must("dsn", Shape::Object(&SECRET), "How to connect, by reference: a `postgres://` URL or `key=value` text."),
    must("publication", Shape::Object(&PUBLICATION), "Which tables are captured."),
    may("slot", Shape::Object(&SLOT), "all defaults", "The replication slot."),
    must(
        "snapshot",
        Shape::Choice(&[
            pick("initial", "load, then follow; so are tables and sinks that are added later"),
            pick("never", "follow changes only: a table is ready when a sink first meets it"),
            pick("only", "load, then stop: no slot is made and no change is captured"),
        ]),
        "Whether existing rows are loaded first. Of a flow that is there only `never` can become `initial`, which loads \
         everything; nothing else can change.",
    ),
    may(
        "largeTransactionBytes",
        Shape::Size,
        "64Mi",
        "A transaction with more bytes than this goes to the side store, and the log only says where it belongs.",
    ),
    may("safety", Shape::Object(&SAFETY), "all defaults", "What may be done to the source."),
]);

static SECRET: Object = Object {
    fields: &[
        may("env", Shape::Text, "", "The name of an environment variable of the workers."),
        may("file", Shape::Text, "", "The absolute path of a file on the workers."),
        may("value", Shape::Text, "", "The value itself, stored as given and never shown: for trials only."),
    ],
    one_of: true,
    secret: true,
};

static PUBLICATION: Object = object(&[
    may("name", Shape::Text, "wallaby_<flow>", "Its name. Cannot change."),
    may("create", Shape::Bool, "true", "Whether WALlaby makes it, keeps its tables and drops it with the flow."),
    may(
        "tables",
        Shape::List(&Shape::Text),
        "none",
        "`schema.table` or `schema.*`. Needed with `create: true`; without it the publication's own tables count. A table that is made later below a `schema.*` is taken in within seconds; with `snapshot: initial` its first change makes a run that loads it.",
    ),
    may("exclude", Shape::List(&Shape::Text), "none", "Tables to leave out of a `schema.*`."),
]);

static SLOT: Object = object(&[
    may("name", Shape::Text, "wallaby_<flow>", "Its name. Cannot change."),
    may("create", Shape::Bool, "true", "Whether WALlaby makes it and drops it with the flow."),
    may(
        "failover",
        Shape::Choice(&[
            pick("auto", "where the server can (PostgreSQL 17 and newer)"),
            pick("on", "always; an error where the server cannot"),
            pick("off", "never"),
        ]),
        "auto",
        "Whether the slot follows to standbys.",
    ),
]);

static SAFETY: Object = object(&[
    may("retainedWalMax", Shape::Size, "50Gi", "Retained WAL above this makes the condition `SlotHealthy` false."),
    may(
        "onExceeded",
        Shape::Choice(&[
            pick("alarm", "a condition and a metric"),
            pick("pauseSnapshot", "the same, and snapshot runs read nothing until the slot holds back less"),
            not_yet("dropSlot", "a slot is never dropped under a flow"),
        ]),
        "alarm",
        "What then happens.",
    ),
    may(
        "snapshotMax",
        Shape::Span,
        "30m",
        "The longest that a run holds one snapshot at the source, because it keeps vacuum from removing dead rows. Past it \
         another one is taken, and chunks that are just being read under the old one are read on for a minute at most; what is read stays, except of tables without a key, and with `snapshot: only` of any table: these \
         begin again unless they are whole. So with `only` it must be longer than the largest table takes.",
    ),
]);

static LOG: Object = object(&[
    may(
        "replicas",
        Shape::Choice(&[
            pick("auto", "3, or 1 where the cluster has fewer than three servers"),
            pick("1", "one copy"),
            pick("3", "three copies"),
            pick("5", "five copies"),
        ]),
        "auto",
        "Copies of the log.",
    ),
    may("maxBytes", Shape::Size, "10Gi", "Reserved by the servers when the log is made. Data stops 16Mi below it."),
    may(
        "replayWindow",
        Shape::Span,
        "1h",
        "How long segments stay that no reader needs any more. While the log is short of room it is less, and the condition `LogHealthy` says so.",
    ),
    may(
        "durability",
        Shape::Choice(&[pick(
            "auto",
            "the servers sync every write, or the acknowledgement is older than twice their sync interval",
        )]),
        "auto",
        "When a change counts as on disk, and Postgres may forget it.",
    ),
    may(
        "codec",
        Shape::Choice(&[pick("lz4", "compressed"), pick("none", "as it is: less CPU, twice the bytes")]),
        "lz4",
        "How segments are packed.",
    ),
    may(
        "sideStore",
        Shape::Object(&SIDE_STORE),
        "`jetstream` with all defaults",
        "Where parts of large transactions and of the first load are kept. Cannot move.",
    ),
]);

static SIDE_STORE: Object = Object {
    fields: &[
        may("jetstream", Shape::Object(&SIDE_JETSTREAM), "", "In streams beside the log, on the log's servers."),
        may("objectStore", Shape::Object(&SIDE_OBJECTS), "", "In an object store that all workers reach."),
    ],
    one_of: true,
    secret: false,
};

static SIDE_JETSTREAM: Object = object(&[
    may(
        "transactionsMax",
        Shape::Size,
        "as `maxBytes`",
        "Bytes for large transactions, reserved when the first one comes. One that does not fit goes into the log.",
    ),
    may(
        "chunksMax",
        Shape::Size,
        "as `maxBytes`",
        "Bytes for the chunks of a load, reserved while a load runs. Reading pauses when they are used up.",
    ),
]);

static SIDE_OBJECTS: Object = object(&[
    must(
        "url",
        Shape::Text,
        "`s3://<bucket>[/<prefix>]`, or `file:///<folder>` that all workers share. Credentials come from the workers' \
         environment (`AWS_…`).",
    ),
    may("transactionsMax", Shape::Size, "as `maxBytes`", "Bytes for large transactions."),
    may("chunksMax", Shape::Size, "as `maxBytes`", "Bytes for the chunks of a load."),
]);

static SINK: Object = object(&[
    must("name", Shape::Name, "The sink's name inside the flow."),
    must("postgres", Shape::Object(&POSTGRES_SINK), "A PostgreSQL database."),
    later("objectStore", "object stores come with a later version: only `postgres` sinks for now"),
    may(
        "onOverrun",
        Shape::Choice(&[
            pick("detach", "this sink alone is cut off from the log and loads everything anew"),
            pick("backpressure", "the flow waits for the sink once the log is full"),
        ]),
        "detach",
        "What happens when the sink is the one that for 8 seconds keeps the log above 75 % of its room for data (`maxBytes` less \
         16Mi), after the replay window was given up. The same counts while it is paused.",
    ),
    may(
        "paused",
        Shape::Bool,
        "false",
        "Stops this sink alone; the log holds what it still needs. When there is no room for that, `onOverrun` counts: by default \
         the sink is cut off, and loaded anew once it is no longer paused.",
    ),
]);

static POSTGRES_SINK: Object = object(&[
    must("dsn", Shape::Object(&SECRET), "How to connect, by reference: a `postgres://` URL or `key=value` text."),
    may(
        "schema",
        Shape::Text,
        "{{ .schema }}",
        "The schema at the sink; `{{ .schema }}` stands for the source's. Cannot change.",
    ),
    may(
        "mode",
        Shape::Choice(&[
            pick("upsert", "the source's state: updates update, deletes delete"),
            not_yet("append", "only `upsert` is built"),
        ]),
        "upsert",
        "How rows are kept.",
    ),
]);

impl Object {
    /// The field with this key.
    pub fn field(&self, key: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.key == key)
    }

    /// The key that was probably meant by `key`: the nearest one that can be used, when it is near.
    pub fn nearest(&self, key: &str) -> Option<&'static str> {
        let usable = self.fields.iter().filter(|field| field.not_yet.is_none() && !field.ignored);
        let lower = key.to_lowercase();
        usable
            .map(|field| (strsim::damerau_levenshtein(&lower, &field.key.to_lowercase()), field.key))
            .filter(|(distance, known)| *distance <= 1 + known.len() / 4)
            .min_by_key(|(distance, _)| *distance)
            .map(|(_, known)| known)
    }
}
