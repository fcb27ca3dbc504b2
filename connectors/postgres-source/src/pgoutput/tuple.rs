//! The values of one row, read where they lie.

use super::DecodeError;
use super::cursor::Cursor;

/// One value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell<'a> {
    /// NULL.
    Null,
    /// An out-of-line value that the update did not touch; the WAL does not carry it.
    Unchanged,
    /// The type's text form.
    Text(&'a [u8]),
    /// The type's binary form.
    Binary(&'a [u8]),
}

/// A row in a message. Its cells are read, and checked, as they are asked for.
#[derive(Clone, Debug)]
pub struct Tuple<'a> {
    columns: u16,
    cells: Cursor<'a>,
    /// The tuple must end where the message ends.
    last: bool,
}

impl PartialEq for Tuple<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.columns == other.columns
            && self.cells.message().get(self.cells.offset()..) == other.cells.message().get(other.cells.offset()..)
    }
}

impl<'a> Tuple<'a> {
    /// A tuple that the rest of the message is.
    pub(super) fn read_last(cursor: &mut Cursor<'a>) -> Result<Tuple<'a>, DecodeError> {
        let columns = cursor.u16()?;
        let cells = Cursor::at(cursor.message(), cursor.offset(), cursor.kind());
        cursor.skip_rest();
        Ok(Tuple { columns, cells, last: true })
    }

    /// A tuple with something after it: it has to be walked to find its end.
    pub(super) fn read_and_walk(cursor: &mut Cursor<'a>) -> Result<Tuple<'a>, DecodeError> {
        let columns = cursor.u16()?;
        let cells = Cursor::at(cursor.message(), cursor.offset(), cursor.kind());
        for _ in 0..columns {
            read_cell(cursor)?;
        }
        Ok(Tuple { columns, cells, last: false })
    }

    /// The number of its columns.
    pub fn columns(&self) -> usize {
        usize::from(self.columns)
    }

    /// An upper bound of the bytes of its values.
    pub fn bytes_at_most(&self) -> usize {
        self.cells.message().len() - self.cells.offset()
    }

    /// Its values in order. After the last one, call [`Cells::finish`].
    pub fn cells(&self) -> Cells<'a> {
        Cells { cursor: self.cells.clone(), last: self.last }
    }

    pub(super) fn check(&self) -> Result<usize, DecodeError> {
        let mut cells = self.cells();
        for _ in 0..self.columns {
            cells.read()?;
        }
        cells.finish()?;
        Ok(self.columns())
    }
}

/// Reads the values of a [`Tuple`].
#[derive(Clone, Debug)]
pub struct Cells<'a> {
    cursor: Cursor<'a>,
    last: bool,
}

impl<'a> Cells<'a> {
    /// The next value. The caller counts: there are [`Tuple::columns`] of them.
    ///
    /// # Errors
    /// When the tuple is damaged.
    #[inline]
    pub fn read(&mut self) -> Result<Cell<'a>, DecodeError> {
        read_cell(&mut self.cursor)
    }

    /// Checks, behind the last value, that nothing is left over.
    ///
    /// # Errors
    /// When something is.
    pub fn finish(&self) -> Result<(), DecodeError> {
        if self.last { self.cursor.finish() } else { Ok(()) }
    }
}

#[inline]
fn read_cell<'a>(cursor: &mut Cursor<'a>) -> Result<Cell<'a>, DecodeError> {
    Ok(match cursor.u8()? {
        b't' => {
            let length = cursor.u32()? as usize;
            Cell::Text(cursor.take(length)?)
        }
        b'n' => Cell::Null,
        b'u' => Cell::Unchanged,
        b'b' => {
            let length = cursor.u32()? as usize;
            Cell::Binary(cursor.take(length)?)
        }
        _ => return Err(cursor.bad_code()),
    })
}
