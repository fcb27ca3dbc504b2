//! The tables of a stream by oid.
//!
//! Every row asks several times, and rows of one table come in runs: the last answer is kept, so that a run costs no
//! hashing.

use std::cell::Cell;
use std::collections::HashMap;

use super::table::TableBuilder;

/// Tables by oid.
#[derive(Default)]
pub(super) struct TableSet {
    tables: Vec<TableBuilder>,
    places: HashMap<u32, usize>,
    /// Oid and place of the last answer.
    last: Cell<Option<(u32, usize)>>,
}

impl TableSet {
    #[inline]
    fn place(&self, oid: u32) -> Option<usize> {
        match self.last.get() {
            Some((last, place)) if last == oid => Some(place),
            _ => {
                let place = *self.places.get(&oid)?;
                self.last.set(Some((oid, place)));
                Some(place)
            }
        }
    }

    #[inline]
    pub(super) fn get(&self, oid: u32) -> Option<&TableBuilder> {
        self.tables.get(self.place(oid)?)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, oid: u32) -> Option<&mut TableBuilder> {
        let place = self.place(oid)?;
        self.tables.get_mut(place)
    }

    /// Puts a table in the place of the one with its oid, or in a new one.
    pub(super) fn insert(&mut self, oid: u32, table: TableBuilder) {
        match self.place(oid) {
            Some(place) => self.tables[place] = table,
            None => {
                self.places.insert(oid, self.tables.len());
                self.tables.push(table);
            }
        }
    }
}
