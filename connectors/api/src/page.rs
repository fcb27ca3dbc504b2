//! The docs page of a sink's guarantees, printed from what the sink declares in code.

use std::fmt::Write as _;

use crate::{Capabilities, Guarantee};

/// The Markdown page of one sink. A test of each sink compares the committed page with this.
pub fn guarantees_page(capabilities: &Capabilities) -> String {
    let mut page = String::new();
    let guarantee = match capabilities.guarantee {
        Guarantee::ExactlyOnce => "**Exactly once**: every change takes effect once, whatever dies.",
        Guarantee::AtLeastOnce => "**At least once**: a change may take effect again, with the same position.",
    };
    let transactions = if capabilities.transactional {
        "A source transaction becomes visible as one."
    } else {
        "A source transaction may become visible in parts."
    };
    let mebibytes = capabilities.batch_bytes_max >> 20;
    // Writing to a String cannot fail.
    let _ = write!(
        page,
        "<!-- Generated from the sink's declaration; `WALLABY_BLESS=1 cargo test -p wallaby-{name} page` writes it. -->\n\n\
         # The `{name}` sink\n\n\
         {guarantee}\n\n{transactions}\n\n\
         A batch has at most {rows} rows or {mebibytes} MiB, unless a single transaction is larger.\n\n\
         ## What the guarantee rests on, and its limits\n\n",
        name = capabilities.name,
        rows = capabilities.batch_rows_max,
    );
    for note in capabilities.notes {
        let _ = writeln!(page, "- {note}");
    }
    page
}
