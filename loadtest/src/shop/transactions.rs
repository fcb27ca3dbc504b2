//! The shop's transactions as SQL text, chosen and filled by a seeded generator. Pure: nothing here talks to a database.
//!
//! A transaction is one text that is sent in one round trip. Rows are addressed by numbers that may not exist any more: such a
//! statement changes nothing, which is fine.

use std::fmt::Write as _;

use rand::Rng;
use rand::rngs::StdRng;

/// How many customers and products the first transactions insert.
pub(crate) const CUSTOMERS: i64 = 500;
/// See [`CUSTOMERS`].
pub(crate) const PRODUCTS: i64 = 200;
const WAREHOUSES: [&str; 3] = ["east", "north", "west"];

/// One kind of transaction and how often it comes, relative to the others.
type Kind = (u32, fn(&mut StdRng, i64) -> String);

const KINDS: &[Kind] = &[
    (400, place_order),
    (250, advance_orders),
    (120, restock),
    (80, reprice),
    (40, cancel_order),
    (40, fill_cart),
    (30, change_customer),
    (20, add_customer),
    (20, rewrite_description),
    (20, change_mind),
    (10, rename_product),
    (10, swap_emails),
    (5, audit_only),
    (3, sweep),
    (1, empty_carts),
];

/// The next transaction. `orders` is about the highest order number that exists.
pub(crate) fn next(random: &mut StdRng, orders: i64) -> String {
    let sum: u32 = KINDS.iter().map(|(weight, _)| weight).sum();
    let mut ticket = random.random_range(0..sum);
    for (weight, make) in KINDS {
        if ticket < *weight {
            return format!("BEGIN; {} COMMIT", make(random, orders.max(1)));
        }
        ticket -= weight;
    }
    unreachable!("the ticket is below the sum of the weights")
}

/// The transactions that open an empty shop: its catalog, a first order and a first cart. They do nothing in one that has them.
///
/// After them every table of [`super::TABLES`] has a row, so whoever follows the changes meets each, however short the traffic.
pub(crate) fn opening(random: &mut StdRng) -> Vec<String> {
    let customers = format!(
        "INSERT INTO customers (id, email, name, address, tags, balance, score) \
         SELECT n, 'c' || n || '@example.org', 'Customer ' || n, jsonb_build_object('street', 'Road ' || n, 'zip', 10000 + n), \
         ARRAY['t' || n % 7, NULL, 'with \"quotes\", and commas'], n * 1.25, CASE WHEN n % 50 = 0 THEN 'NaN' ELSE n / 3.0 END \
         FROM generate_series(1, {CUSTOMERS}) n ON CONFLICT (id) DO NOTHING; \
         SELECT setval(pg_get_serial_sequence('customers', 'id'), greatest({CUSTOMERS}, (SELECT max(id) FROM customers)));"
    );
    let letter = random.random_range(0..26);
    let products = format!(
        "INSERT INTO products SELECT 'SKU-' || lpad(n::text, 5, '0'), n, 'Product ' || n, repeat(chr(97 + (n::int + {letter}) % 26), 3000 + n::int * 7), \
         jsonb_build_object('colour', n % 5, 'sizes', ARRAY[n, n + 1]), (n % 90) + 0.99, n / 7.0, decode(md5(n::text), 'hex'), n % 40 = 0 \
         FROM generate_series(1, {PRODUCTS}) n ON CONFLICT DO NOTHING; \
         INSERT INTO inventory SELECT w, sku, 100, clock_timestamp() FROM products, unnest(ARRAY['east','north','west']) w ON CONFLICT DO NOTHING;"
    );
    let first_order = "WITH first AS (INSERT INTO orders (customer_id, total) SELECT 1, 1.99 \
         WHERE NOT EXISTS (SELECT FROM orders) RETURNING id, customer_id), \
         line AS (INSERT INTO order_items (order_id, line, sku, quantity, price) \
         SELECT first.id, 1, sku, 1, price FROM first, products WHERE number = 1) \
         INSERT INTO carts (customer_id, content) SELECT customer_id, '{\"items\": []}' FROM first ON CONFLICT DO NOTHING;";
    [&customers, &products, first_order].into_iter().map(|sql| format!("BEGIN; {sql} COMMIT")).collect()
}

/// A product's current key, looked up by its lasting number.
fn sku(random: &mut StdRng) -> String {
    format!("(SELECT sku FROM products WHERE number = {})", random.random_range(1..=PRODUCTS))
}

/// An order, younger ones more often.
fn order(random: &mut StdRng, orders: i64) -> i64 {
    let age = random.random::<f64>().powi(3) * orders as f64;
    (orders - age as i64).max(1)
}

fn customer(random: &mut StdRng) -> i64 {
    random.random_range(1..=CUSTOMERS)
}

fn place_order(random: &mut StdRng, _orders: i64) -> String {
    let note = match random.random_range(0..5) {
        0 => "NULL".to_owned(),
        1 => "E'two\\nlines\\tand a \\\\ backslash'".to_owned(),
        2 => "'Grüße, 東京 🛒'".to_owned(),
        _ => format!("'note {}'", random.random::<u32>()),
    };
    let lines = random.random_range(1..=6);
    let mut values = Vec::new();
    for line in 1..=lines {
        let (quantity, cents) = (random.random_range(1..10), random.random_range(99..99_999));
        let options = if line % 3 == 0 { "ARRAY['gift', 'blue']" } else { "NULL" };
        values.push(format!("({line}, {}, {quantity}, {cents} / 100.0, {options}::text[])", sku(random)));
    }
    let mut sql = format!(
        "WITH placed AS (INSERT INTO orders (customer_id, total, ship_on, ship_at, delivery, note, discounts) VALUES \
         ({}, {} / 100.0, current_date + {}, '{:02}:30', '{} days 02:03', {note}, '{{{}.50,NULL}}') RETURNING id) \
         INSERT INTO order_items (order_id, line, sku, quantity, price, options) \
         SELECT placed.id, v.* FROM placed, (VALUES {}) v(line, sku, quantity, price, options) WHERE v.sku IS NOT NULL;",
        customer(random),
        random.random_range(1_000..1_000_000),
        random.random_range(1..9),
        random.random_range(0..24),
        random.random_range(1..40),
        random.random_range(0..20),
        values.join(", "),
    );
    // Writing to a String cannot fail.
    let _ = write!(sql, " INSERT INTO audit_log (message) VALUES ('order placed');");
    sql
}

fn advance_orders(random: &mut StdRng, orders: i64) -> String {
    let first = order(random, orders);
    let many = random.random_range(1..6);
    format!(
        "UPDATE orders SET status = CASE status WHEN 'new' THEN 'paid' WHEN 'paid' THEN 'shipped' ELSE 'delivered' END::order_status \
         WHERE id IN (SELECT id FROM orders WHERE id BETWEEN {first} AND {first} + {many} ORDER BY id FOR UPDATE);"
    )
}

fn restock(random: &mut StdRng, _orders: i64) -> String {
    let warehouse = WAREHOUSES[random.random_range(0..WAREHOUSES.len())];
    let (first, delta) = (random.random_range(1..=PRODUCTS), random.random_range(-5..20));
    format!(
        "UPDATE inventory SET quantity = quantity + {delta}, counted_at = clock_timestamp() WHERE (warehouse, sku) IN \
         (SELECT warehouse, sku FROM inventory JOIN products USING (sku) WHERE warehouse = '{warehouse}' \
         AND number BETWEEN {first} AND {first} + 4 ORDER BY sku FOR UPDATE OF inventory);"
    )
}

/// Leaves the large description alone: it arrives as unchanged.
fn reprice(random: &mut StdRng, _orders: i64) -> String {
    let (cents, number) = (random.random_range(99..99_999), random.random_range(1..=PRODUCTS));
    format!("UPDATE products SET price = {cents} / 100.0, discontinued = NOT discontinued WHERE number = {number};")
}

fn cancel_order(random: &mut StdRng, orders: i64) -> String {
    format!("DELETE FROM orders WHERE id = {};", order(random, orders))
}

fn fill_cart(random: &mut StdRng, _orders: i64) -> String {
    let (customer, count) = (customer(random), random.random_range(0..9));
    format!(
        "INSERT INTO carts (customer_id, content) VALUES ({customer}, '{{\"items\": [{count}],  \"spaces\":\"kept\"}}') \
         ON CONFLICT (customer_id) DO UPDATE SET content = EXCLUDED.content, updated_at = clock_timestamp();"
    )
}

fn change_customer(random: &mut StdRng, _orders: i64) -> String {
    let (customer, cents) = (customer(random), random.random_range(-9_999..9_999));
    let score = ["'NaN'", "'-Infinity'", "0.1", "1e-300", "NULL"][random.random_range(0..5)];
    format!("UPDATE customers SET balance = balance + {cents} / 100.0, score = {score} WHERE id = {customer};")
}

fn add_customer(random: &mut StdRng, _orders: i64) -> String {
    let tag = random.random::<u64>();
    format!(
        "INSERT INTO customers (email, name) VALUES ('{tag:016x}-' || gen_random_uuid() || '@example.org', 'Walk-in');"
    )
}

fn rewrite_description(random: &mut StdRng, _orders: i64) -> String {
    let (number, length) = (random.random_range(1..=PRODUCTS), random.random_range(0..30_000));
    let letter = char::from(b'a' + random.random_range(0..26));
    format!("UPDATE products SET description = repeat('{letter}', {length}) WHERE number = {number};")
}

/// Part of the work is rolled back to a savepoint: it must never arrive.
fn change_mind(random: &mut StdRng, orders: i64) -> String {
    let (kept, undone) = (order(random, orders), order(random, orders));
    let (kept, undone) = (kept.min(undone), kept.max(undone));
    format!(
        "UPDATE orders SET note = 'kept' WHERE id = {kept}; SAVEPOINT s; UPDATE orders SET note = 'undone' WHERE id = {undone}; \
         INSERT INTO customers (email, name) VALUES ('undone-' || gen_random_uuid(), 'Undone'); ROLLBACK TO s;"
    )
}

/// The key changes and the large description does not: it arrives as unchanged under a new key. The cascades touch two tables.
fn rename_product(random: &mut StdRng, _orders: i64) -> String {
    let (number, suffix) = (random.random_range(1..=PRODUCTS), random.random_range(0..100_000));
    format!("UPDATE products SET sku = 'SKU-' || lpad(number::text, 5, '0') || '-{suffix}' WHERE number = {number};")
}

fn swap_emails(random: &mut StdRng, _orders: i64) -> String {
    let first = random.random_range(1..CUSTOMERS);
    let pair = format!("({first}, {})", first + 1);
    format!(
        "UPDATE customers a SET email = b.email FROM (SELECT id, email FROM customers WHERE id IN {pair} ORDER BY id FOR UPDATE) b \
         WHERE a.id IN {pair} AND b.id <> a.id;"
    )
}

/// Nothing that the flow captures.
fn audit_only(random: &mut StdRng, _orders: i64) -> String {
    format!("INSERT INTO audit_log (message) VALUES ('visit {}');", random.random::<u32>())
}

/// A transaction of a few thousand rows.
fn sweep(random: &mut StdRng, orders: i64) -> String {
    let first = order(random, orders);
    format!(
        "UPDATE order_items SET quantity = quantity + 1 WHERE (order_id, line) IN \
         (SELECT order_id, line FROM order_items WHERE order_id BETWEEN {first} AND {first} + 400 ORDER BY order_id, line FOR UPDATE);"
    )
}

fn empty_carts(_random: &mut StdRng, _orders: i64) -> String {
    "TRUNCATE carts;".to_owned()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_transactions() {
        let sequence = |seed| {
            let mut random = StdRng::seed_from_u64(seed);
            (0..500).map(|orders| next(&mut random, orders)).collect::<Vec<_>>()
        };
        assert_eq!(sequence(7), sequence(7));
        assert_ne!(sequence(7), sequence(8));
    }

    #[test]
    fn every_kind_comes_up() {
        let mut random = StdRng::seed_from_u64(1);
        let all: Vec<_> = (0..20_000).map(|_| next(&mut random, 100)).collect();
        let marks = ["TRUNCATE", "SAVEPOINT", "SET sku", "DELETE", "b.email", "repeat(", "order placed", "ON CONFLICT"];
        for mark in marks {
            assert!(all.iter().any(|sql| sql.contains(mark)), "no transaction with {mark} in 20,000");
        }
    }
}
