//! The sample shop: a schema that has what makes change streams hard, and a load that uses it.
//!
//! Nothing is inserted when the schema is made: a flow that says `snapshot: never` carries only what is committed after its slot
//! exists. The load inserts customers and products itself, as its first transactions.

mod load;
mod transactions;

pub use load::{Load, LoadOptions, LoadProgress};

use crate::Error;
use crate::connection::connect;

/// The tables that the example flow captures, in an order that respects foreign keys.
pub const TABLES: [&str; 6] =
    ["public.customers", "public.products", "public.orders", "public.order_items", "public.inventory", "public.carts"];
/// A table with traffic that the example flow leaves out.
pub const TABLE_EXCLUDED: &str = "public.audit_log";
/// The statements that make the schema, for `psql` as well.
pub const SCHEMA: &str = include_str!("schema.sql");

/// Makes the shop's tables, without rows, in one transaction.
///
/// # Errors
/// When the database cannot be reached, or has the tables already.
pub async fn create_schema(dsn: &str) -> Result<(), Error> {
    let client = connect(dsn, "the shop's database").await?;
    let sql = format!("BEGIN; {SCHEMA} COMMIT");
    client.batch_execute(&sql).await.map_err(Error::postgres("making the shop's tables"))
}
