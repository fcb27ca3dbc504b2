//! Sorts a batch by table, and each table's rows into runs of one shape. Pure.

use std::sync::Arc;

use wallaby_connector_api::BatchPart;
use wallaby_model::{Op, Position, TableChanges, TableName, TableSchema};

use crate::collapse::Chunk;

/// Rows of one table in one shape, in position order.
pub(crate) struct Run {
    /// The shape.
    pub schema: Arc<TableSchema>,
    /// The rows.
    pub chunks: Vec<Chunk>,
}

/// What a batch holds of one table.
pub(crate) struct TableRuns {
    /// The table at the source.
    pub table: TableName,
    /// The table is emptied first: the batch truncates it, and what came before that does not matter any more.
    pub truncated: bool,
    /// Every shape of the table in the batch, in order, with the position of its first row, also where all its rows
    /// were truncated away.
    pub shapes: Vec<(Arc<TableSchema>, Position)>,
    /// What came after the last truncation.
    pub runs: Vec<Run>,
}

/// The tables of a batch in the order in which they appear.
pub(crate) fn tables(parts: &[BatchPart]) -> Vec<TableRuns> {
    let mut tables: Vec<TableRuns> = Vec::new();
    for part in parts {
        let mut slices: Vec<Chunk> =
            part.tables().map(|changes| Chunk { body: Arc::clone(&part.body), changes }).collect();
        while let Some(first) = slices.first() {
            let name = first.changes.schema.table.clone();
            let (same, others): (Vec<_>, Vec<_>) =
                slices.into_iter().partition(|slice| slice.changes.schema.table == name);
            slices = others;
            let at = tables.iter().position(|table| table.table == name).unwrap_or_else(|| {
                tables.push(TableRuns { table: name, truncated: false, shapes: Vec::new(), runs: Vec::new() });
                tables.len() - 1
            });
            for chunk in in_order(same) {
                add(&mut tables[at], chunk);
            }
        }
    }
    tables
}

fn add(table: &mut TableRuns, chunk: Chunk) {
    let shape = &Arc::clone(&chunk.changes.schema);
    let is_same = |other: &Arc<TableSchema>| Arc::ptr_eq(other, shape) || other == shape;
    let first = chunk.position(0);
    if !table.shapes.last().is_some_and(|(last, _)| is_same(last)) {
        table.shapes.push((Arc::clone(shape), first));
    }
    let last_truncate = chunk.changes.op().values().iter().rposition(|&op| op == Op::Truncate as u8);
    let chunk = match last_truncate {
        None => chunk,
        Some(row) => {
            table.truncated = true;
            table.runs.clear();
            let rest = chunk.changes.rows.num_rows() - row - 1;
            if rest == 0 {
                return;
            }
            let rows = chunk.changes.rows.slice(row + 1, rest);
            Chunk { changes: TableChanges { schema: Arc::clone(shape), rows }, body: chunk.body }
        }
    };
    match table.runs.last_mut() {
        Some(run) if is_same(&run.schema) => run.chunks.push(chunk),
        _ => {
            let schema = Arc::clone(&chunk.changes.schema);
            table.runs.push(Run { schema, chunks: vec![chunk] });
        }
    }
}

/// One table's slices of one segment. There is one for each shape, and with two shapes, rows of both may alternate.
fn in_order(slices: Vec<Chunk>) -> Vec<Chunk> {
    if slices.len() == 1 {
        return slices;
    }
    let mut next = vec![0; slices.len()];
    let mut ordered = Vec::new();
    loop {
        let head = |index: usize, next: &[usize]| {
            let slice: &Chunk = &slices[index];
            (next[index] < slice.changes.rows.num_rows()).then(|| slice.position(next[index]))
        };
        let heads = (0..slices.len()).filter_map(|index| head(index, &next).map(|position| (position, index)));
        let mut heads: Vec<_> = heads.collect();
        heads.sort_unstable();
        let Some(&(_, index)) = heads.first() else { return ordered };
        let until = heads.get(1).map(|&(position, _)| position);
        let slice = &slices[index];
        let start = next[index];
        let mut end = start;
        while end < slice.changes.rows.num_rows() && until.is_none_or(|until| slice.position(end) < until) {
            end += 1;
        }
        next[index] = end;
        let rows = slice.changes.rows.slice(start, end - start);
        let changes = TableChanges { schema: Arc::clone(&slice.changes.schema), rows };
        ordered.push(Chunk { body: Arc::clone(&slice.body), changes });
    }
}

/// The positions of all changes of a batch, in order; before-images stand at their change's.
pub(crate) fn positions(parts: &[BatchPart]) -> Vec<Position> {
    let mut positions = Vec::new();
    for part in parts {
        for changes in part.tables() {
            let rows = 0..changes.rows.num_rows();
            positions.extend(rows.map(|row| changes.position(row, &part.body.transactions)));
        }
    }
    positions.sort_unstable();
    positions.dedup();
    positions
}

/// The parts' share of `(after, up_to]`.
pub(crate) fn slice(parts: &[BatchPart], after: Position, up_to: Position) -> Vec<BatchPart> {
    let narrowed = parts.iter().map(|part| BatchPart {
        body: Arc::clone(&part.body),
        after: part.after.max(after),
        up_to: part.up_to.min(up_to),
        tables: part.tables.clone(),
    });
    narrowed.filter(|part| part.after < part.up_to).collect()
}

/// `, key (id)=(5)`: the last row's key for a message; empty for a table without a key.
pub(crate) fn key_text(changes: &TableChanges) -> String {
    let key = crate::schema::key_of(&changes.schema);
    let Some(row) = changes.rows.num_rows().checked_sub(1) else { return String::new() };
    if key.is_empty() {
        return String::new();
    }
    let names = key.iter().map(|&column| changes.schema.columns[column].name.as_str());
    let names: Vec<_> = names.collect();
    let values = key.iter().map(|&column| value_text(changes, row, column));
    let values: Vec<_> = values.collect();
    format!(", key ({})=({})", names.join(", "), values.join(", "))
}

fn value_text(changes: &TableChanges, row: usize, column: usize) -> String {
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Int16Type, Int32Type, Int64Type};
    use wallaby_model::ColumnType;
    let array = changes.rows.column(wallaby_model::change::FIRST_COLUMN + column);
    match changes.schema.columns[column].kind {
        ColumnType::Int2 => array.as_primitive::<Int16Type>().value(row).to_string(),
        ColumnType::Int4 => array.as_primitive::<Int32Type>().value(row).to_string(),
        ColumnType::Int8 => array.as_primitive::<Int64Type>().value(row).to_string(),
        ColumnType::Uuid => array.as_fixed_size_binary().value(row).iter().map(|byte| format!("{byte:02x}")).collect(),
        ColumnType::Text | ColumnType::Enum | ColumnType::Numeric => array.as_string::<i32>().value(row).to_owned(),
        // Other kinds are rare as keys; the position says which change it is.
        _ => "…".to_owned(),
    }
}
