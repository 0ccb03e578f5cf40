//! Whole tables of numbers: comma-separated values with a header row, compressed or not, read row by row.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use flate2::read::MultiGzDecoder;

/// Most columns of a table.
const COLUMNS_MAX: usize = 10_000;

/// A table that is being read.
pub(crate) struct Table {
    path: PathBuf,
    rows: csv::Reader<Box<dyn Read>>,
    record: csv::StringRecord,
    row: u64,
    names: Vec<String>,
}

impl Table {
    /// Opens a table; a name that ends with `.gz` is of a compressed one. Errors name the file.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        Self::try_open(path).with_context(|| path.display().to_string())
    }

    fn try_open(path: &Path) -> anyhow::Result<Self> {
        let file = BufReader::new(File::open(path)?);
        let is_compressed = path.extension().is_some_and(|extension| extension == "gz");
        let input: Box<dyn Read> = if is_compressed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
        let mut rows = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(input);
        let names: Vec<String> = rows.headers().context("in the header row")?.iter().map(str::to_owned).collect();
        ensure!(!names.is_empty(), "there is no header row");
        ensure!(names.len() <= COLUMNS_MAX, "{} columns, at most {COLUMNS_MAX}", names.len());
        for (at, name) in names.iter().enumerate() {
            ensure!(!names[..at].contains(name), "there are several columns {name:?} in the header row");
        }
        Ok(Table { path: path.to_path_buf(), rows, record: csv::StringRecord::new(), row: 0, names })
    }

    /// Names of the columns.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// The place of a column.
    pub(crate) fn find(&self, name: &str) -> anyhow::Result<usize> {
        let place = self.names.iter().position(|other| other == name);
        place.with_context(|| format!("{}: there is no column {name:?} in the header row", self.path.display()))
    }

    /// Reads the next row into `values`, one for each of `places`; an empty cell, and one that is no finite number but says so (`NaN`,
    /// `inf`), is missing: NaN. False at the end. Errors name the file, the row (from 1, the header not counted), its line and its column.
    pub(crate) fn next(&mut self, places: &[usize], values: &mut Vec<f32>) -> anyhow::Result<bool> {
        self.try_next(places, values).with_context(|| self.path.display().to_string())
    }

    fn try_next(&mut self, places: &[usize], values: &mut Vec<f32>) -> anyhow::Result<bool> {
        self.row += 1;
        if !self.rows.read_record(&mut self.record).with_context(|| format!("in row {}", self.row))? {
            return Ok(false);
        }
        values.clear();
        for place in places {
            let cell = &self.record[*place];
            match cell.parse::<f32>() {
                Ok(value) => values.push(if value.is_finite() { value } else { f32::NAN }),
                Err(_) if cell.is_empty() => values.push(f32::NAN),
                Err(_) => {
                    let (row, line) = (self.row, self.record.position().map_or(0, csv::Position::line));
                    bail!(
                        "row {row} (line {line}), column {:?}: expected a number, found {cell:?}",
                        self.names[*place]
                    );
                }
            }
        }
        Ok(true)
    }

    /// The cell of the current row as it is written.
    pub(crate) fn text(&self, place: usize) -> &str {
        &self.record[place]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str, text: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("lab-table-{name}-{}.csv", std::process::id()));
        std::fs::write(&path, text).expect("a temporary file");
        path
    }

    #[test]
    fn rows_are_read_in_the_order_of_the_places_that_were_asked_for() {
        let path = table("rows", "t,a,b\n1,2,3\n4,,NaN\n");
        let mut table = Table::open(&path).expect("it is a table");
        let (places, mut values) = ([table.find("b").unwrap(), table.find("a").unwrap()], Vec::new());
        assert!(table.next(&places, &mut values).unwrap());
        assert_eq!((values.as_slice(), table.text(0)), ([3.0, 2.0].as_slice(), "1"));
        assert!(table.next(&places, &mut values).unwrap());
        assert!(values.iter().all(|value| value.is_nan()), "missing: {values:?}");
        assert!(!table.next(&places, &mut values).unwrap());
        std::fs::remove_file(path).expect("it is there");
    }

    #[test]
    fn errors_name_file_row_line_and_column() {
        for (name, text, expected) in [
            ("word", "a,b\n1,2\n1,x\n", "row 2 (line 3), column \"b\": expected a number, found \"x\""),
            ("short", "a,b\n1\n", "in row 1"),
            ("twice", "a,a\n1,2\n", "there are several columns \"a\" in the header row"),
            ("empty", "", "there is no header row"),
        ] {
            let path = table(name, text);
            let read = Table::open(&path).and_then(|mut table| {
                let places: Vec<usize> = (0..table.names().len()).collect();
                let mut values = Vec::new();
                while table.next(&places, &mut values)? {}
                Ok(())
            });
            let error = format!("{:#}", read.expect_err("this table is refused"));
            std::fs::remove_file(&path).expect("it is there");
            assert!(error.contains(expected) && error.starts_with(&path.display().to_string()), "{error}");
        }
    }
}
