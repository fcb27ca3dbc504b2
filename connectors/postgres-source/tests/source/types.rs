//! Every text parser against Postgres itself.
//!
//! A table with a column per type gets thousands of values, seeded random and edges; what was captured is compared with
//! what Postgres computes of the same value by other means (casts to numbers, binary form), in Arrow's units.

use rand::Rng;
use rand::rngs::StdRng;
use wallaby_model::Op;
use wallaby_testkit::{Database, Seeded};

use crate::kit::{Flow, hex, rows_of};

const COLUMNS: [(&str, &str, &str); 14] = [
    // column, type, what Arrow must hold, as text
    ("b", "bool", "b::text"),
    ("i2", "int2", "i2::text"),
    ("i4", "int4", "i4::text"),
    ("i8", "int8", "i8::text"),
    ("o", "oid", "o::text"),
    ("n", "numeric", "n::text"),
    ("by", "bytea", "encode(by, 'hex')"),
    ("u", "uuid", "replace(u::text, '-', '')"),
    (
        "d",
        "date",
        "CASE WHEN d = 'infinity' THEN '2147483647' WHEN d = '-infinity' THEN '-2147483648' ELSE (d - date '1970-01-01')::text END",
    ),
    ("t", "time", "(extract(epoch FROM t) * 1000000)::int8::text"),
    ("ts", "timestamp", "encode(timestamp_send(ts), 'hex')"),
    ("tz", "timestamptz", "encode(timestamptz_send(tz), 'hex')"),
    ("iv", "interval", "encode(interval_send(iv), 'hex')"),
    ("f8", "float8", "encode(float8send(f8), 'hex')"),
];

/// The value that was captured, in the form that the oracle gives.
fn ours(kind: &str, shown: &str) -> String {
    match kind {
        "timestamp" | "timestamptz" => hex(&shown.parse::<i64>().unwrap().to_be_bytes()),
        "interval" => {
            let mut parts = shown.split('/');
            let months: i32 = parts.next().unwrap().parse().unwrap();
            let days: i32 = parts.next().unwrap().parse().unwrap();
            let micros: i64 = parts.next().unwrap().parse().unwrap();
            format!("{}{}{}", hex(&micros.to_be_bytes()), hex(&days.to_be_bytes()), hex(&months.to_be_bytes()))
        }
        "float8" => hex(&shown.parse::<f64>().unwrap().to_be_bytes()),
        _ => shown.to_owned(),
    }
}

fn edges() -> Vec<Vec<&'static str>> {
    vec![
        vec!["t", "f"],
        vec!["-32768", "32767", "0"],
        vec!["-2147483648", "2147483647"],
        vec!["-9223372036854775808", "9223372036854775807"],
        vec!["0", "4000000000", "4294967295"],
        vec!["NaN", "Infinity", "-Infinity", "10.1111", "3.30", "-0.00", "1e100", "1e-100"],
        vec!["\\x", "\\x00ff"],
        vec!["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"],
        vec![
            "infinity",
            "-infinity",
            "4713-01-01 BC",
            "5874897-12-31",
            "0001-01-01",
            "0001-12-31 BC",
            "2000-02-29",
            "1582-10-10",
            "0044-03-15 BC",
        ],
        vec!["00:00:00", "24:00:00", "23:59:59.999999", "00:00:00.000001"],
        vec![
            "infinity",
            "-infinity",
            "4713-01-01 00:00:00 BC",
            "294276-12-31 23:59:59.999999",
            "1969-12-31 23:59:59.999999",
            "1999-12-31 23:59:59.5",
            "21016-01-01",
        ],
        vec![
            "infinity",
            "-infinity",
            "4713-01-02 00:00:00+00 BC",
            "294276-12-31 23:59:59.999999+00",
            "2026-03-29 02:30:00+02",
        ],
        vec![
            "0",
            "infinity",
            "-infinity",
            "178000000 years",
            "-178000000 years",
            "1 year -1 month 1 day -00:00:00.000001",
            "9223372036854775807 microseconds",
            "-9223372036854775807 microseconds",
            "1 month -1 day 00:00:01",
            "-1.5 seconds",
            "36:00:00",
        ],
        vec!["NaN", "Infinity", "-Infinity", "-0", "1e308", "5e-324", "3.3", "4.44", "0.1"],
    ]
}

fn random(rng: &mut StdRng, column: usize) -> String {
    let date = |rng: &mut StdRng| {
        let year = if rng.random_bool(0.8) { rng.random_range(1..9999) } else { rng.random_range(1..290_000) };
        let bc = if year < 4700 && rng.random_bool(0.2) { " BC" } else { "" };
        (format!("{year:04}-{:02}-{:02}", rng.random_range(1..=12), rng.random_range(1..=28)), bc)
    };
    let time = |rng: &mut StdRng| {
        let micros: u32 = if rng.random_bool(0.3) { 0 } else { rng.random_range(0..1_000_000) };
        format!(
            "{:02}:{:02}:{:02}.{micros:06}",
            rng.random_range(0..24),
            rng.random_range(0..60),
            rng.random_range(0..60)
        )
    };
    match column {
        0 => if rng.random() { "t" } else { "f" }.into(),
        1 => rng.random::<i16>().to_string(),
        2 => rng.random::<i32>().to_string(),
        3 => (rng.random::<i64>() >> rng.random_range(0..64)).to_string(),
        4 => rng.random::<u32>().to_string(),
        5 => format!("{}.{:0width$}", rng.random::<i64>(), rng.random_range(0..1000), width = rng.random_range(1..12)),
        6 => {
            let bytes: Vec<u8> = (0..rng.random_range(0..40)).map(|_| rng.random()).collect();
            format!("\\x{}", hex(&bytes))
        }
        7 => {
            let digits = format!("{:032x}", rng.random::<u128>());
            format!("{}-{}-{}-{}-{}", &digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..])
        }
        8 => {
            let (date, bc) = date(rng);
            format!("{date}{bc}")
        }
        9 => time(rng),
        10 => {
            let (date, bc) = date(rng);
            format!("{date} {}{bc}", time(rng))
        }
        11 => {
            let (date, bc) = date(rng);
            format!("{date} {}{:+03}:{:02}{bc}", time(rng), rng.random_range(-15..=15), rng.random_range(0..60))
        }
        12 => format!(
            "{} months {} days {} microseconds",
            rng.random::<i32>() >> rng.random_range(1..32),
            rng.random::<i32>() >> rng.random_range(1..32),
            rng.random::<i64>() >> rng.random_range(1..64)
        ),
        _ => {
            let value = f64::from_bits(rng.random());
            if value.is_nan() {
                "NaN".into()
            } else if value.is_infinite() {
                "Infinity".into()
            } else {
                format!("{value:e}")
            }
        }
    }
}

#[tokio::test]
async fn b01_to_b16_values_are_what_postgres_says_they_are() {
    const ROWS: usize = 3000;
    let db = Database::create("oracle").await;
    let columns: Vec<String> = COLUMNS.iter().map(|(name, kind, _)| format!("{name} {kind}")).collect();
    db.batch_execute(&format!("CREATE TABLE v (id int PRIMARY KEY, {})", columns.join(", "))).await.unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;

    let mut rng = StdRng::seeded();
    let edges = edges();
    for chunk in 0..ROWS / 500 {
        let mut tuples = Vec::new();
        for id in chunk * 500..(chunk + 1) * 500 {
            let values: Vec<String> = (0..COLUMNS.len())
                .map(|column| match edges[column].get(id) {
                    Some(edge) => format!("'{edge}'"),
                    None if rng.random_bool(0.05) => "NULL".into(),
                    None => format!("'{}'", random(&mut rng, column)),
                })
                .collect();
            tuples.push(format!("({id}, {})", values.join(", ")));
        }
        db.batch_execute(&format!("INSERT INTO v VALUES {}", tuples.join(", "))).await.unwrap();
    }

    let oracle: Vec<String> = COLUMNS.iter().map(|(_, _, sql)| (*sql).to_owned()).collect();
    let expected = db.query(&format!("SELECT {} FROM v ORDER BY id", oracle.join(", ")), &[]).await.unwrap();
    let mut rows = Vec::new();
    while rows.len() < ROWS {
        rows.extend(rows_of(&run.segment().await.body));
    }
    let mut compared = 0;
    for (row, expected) in rows.iter().zip(&expected) {
        assert_eq!(row.op, Op::Insert);
        for (index, (name, kind, _)) in COLUMNS.iter().enumerate() {
            let wanted: Option<String> = expected.get(index);
            let shown = &row.values[index + 1];
            let got = if shown == "NULL" { None } else { Some(ours(kind, shown)) };
            let got = if *name == "b" { got.map(|b| b.to_string()) } else { got };
            assert_eq!(got, wanted, "row {} column {name}: {shown}", row.values[0]);
            compared += 1;
        }
    }
    assert_eq!(compared, ROWS * COLUMNS.len());
}
