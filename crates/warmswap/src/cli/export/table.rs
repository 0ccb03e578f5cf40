//! Tables that records are written to.

use std::io::{BufWriter, Write};
use std::sync::Arc;

use parquet::basic::{Compression, LogicalType, Repetition, TimeUnit, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, FloatType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::types::Type;
use warmswap_predict::{Feature, Record};

use crate::cli::time;

/// A table with one row per record.
pub(super) trait Table {
    /// Adds a row.
    fn row(&mut self, record: &Record) -> std::io::Result<()>;

    /// Writes what is left.
    fn end(self: Box<Self>) -> std::io::Result<()>;
}

/// Columns before those of the features.
const COLUMNS: [&str; 5] = ["end_time", "grain", "number", "backend", "span_us"];

/// Text, a line per row.
pub(super) struct Csv<W: Write> {
    out: BufWriter<W>,
}

impl<W: Write> Csv<W> {
    /// Writes the names of the columns.
    pub(super) fn new(out: W) -> std::io::Result<Self> {
        let mut out = BufWriter::new(out);
        write!(out, "{}", COLUMNS.join(","))?;
        Feature::ALL.into_iter().try_for_each(|feature| write!(out, ",{}", feature.name()))?;
        writeln!(out)?;
        Ok(Csv { out })
    }
}

impl<W: Write> Table for Csv<W> {
    fn row(&mut self, record: &Record) -> std::io::Result<()> {
        let (end, grain) = (time::timestamp(record.end_unix_ns), record.grain.name());
        write!(self.out, "{end},{grain},{},{},{}", record.number, record.backend, record.span_us)?;
        for feature in Feature::ALL {
            match record.get(feature) {
                Some(value) => write!(self.out, ",{value}")?,
                None => write!(self.out, ",")?,
            }
        }
        writeln!(self.out)
    }

    fn end(mut self: Box<Self>) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// Rows that are written together: a column of them lies in one piece.
const GROUP: usize = 8_192;

/// Apache Parquet.
pub(super) struct Parquet<W: Write + Send> {
    writer: SerializedFileWriter<W>,
    rows: Vec<Record>,
}

fn failed(error: ParquetError) -> std::io::Error {
    match error {
        ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => *source,
            Err(source) => std::io::Error::other(source),
        },
        error => std::io::Error::other(error),
    }
}

fn schema() -> Result<Type, ParquetError> {
    let column = |name: &str, physical, logical, repetition| {
        let builder = Type::primitive_type_builder(name, physical).with_logical_type(logical);
        builder.with_repetition(repetition).build().map(Arc::new)
    };
    let unsigned = |bit_width| Some(LogicalType::integer(bit_width, false));
    let utc = Some(LogicalType::timestamp(true, TimeUnit::MICROS));
    let [end, grain, number, backend, span] = COLUMNS;
    let mut columns = vec![
        column(end, Physical::INT64, utc, Repetition::REQUIRED)?,
        column(grain, Physical::BYTE_ARRAY, Some(LogicalType::String), Repetition::REQUIRED)?,
        column(number, Physical::INT64, unsigned(64), Repetition::REQUIRED)?,
        column(backend, Physical::INT64, unsigned(64), Repetition::REQUIRED)?,
        column(span, Physical::INT32, unsigned(32), Repetition::REQUIRED)?,
    ];
    for feature in Feature::ALL {
        columns.push(column(feature.name(), Physical::FLOAT, None, Repetition::OPTIONAL)?);
    }
    Type::group_type_builder("profile").with_fields(columns).build()
}

impl<W: Write + Send> Parquet<W> {
    /// Begins the file.
    pub(super) fn new(out: W) -> std::io::Result<Self> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_created_by(format!("warmswap {}", env!("CARGO_PKG_VERSION")))
            .build();
        let schema = Arc::new(schema().map_err(failed)?);
        let writer = SerializedFileWriter::new(out, schema, Arc::new(properties)).map_err(failed)?;
        Ok(Parquet { writer, rows: Vec::with_capacity(GROUP) })
    }

    fn write(&mut self) -> Result<(), ParquetError> {
        let rows = &self.rows;
        let mut group = self.writer.next_row_group()?;
        integers(&mut group, rows.iter().map(|row| (row.end_unix_ns / 1_000).cast_signed()))?;
        let grains: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(row.grain.name())).collect();
        let mut column = next(&mut group)?;
        column.typed::<ByteArrayType>().write_batch(&grains, None, None)?;
        column.close()?;
        integers(&mut group, rows.iter().map(|row| row.number.cast_signed()))?;
        integers(&mut group, rows.iter().map(|row| row.backend.cast_signed()))?;
        let spans: Vec<i32> = rows.iter().map(|row| row.span_us.cast_signed()).collect();
        let mut column = next(&mut group)?;
        column.typed::<Int32Type>().write_batch(&spans, None, None)?;
        column.close()?;
        for feature in Feature::ALL {
            let values: Vec<f32> = rows.iter().filter_map(|row| row.get(feature)).collect();
            let present: Vec<i16> = rows.iter().map(|row| i16::from(row.get(feature).is_some())).collect();
            let mut column = next(&mut group)?;
            column.typed::<FloatType>().write_batch(&values, Some(&present), None)?;
            column.close()?;
        }
        group.close()?;
        self.rows.clear();
        Ok(())
    }
}

fn next<'a, W: Write + Send>(
    group: &'a mut SerializedRowGroupWriter<'_, W>,
) -> Result<parquet::file::writer::SerializedColumnWriter<'a>, ParquetError> {
    group.next_column()?.ok_or_else(|| ParquetError::General("there are more columns than the schema has".to_owned()))
}

fn integers<W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: impl Iterator<Item = i64>,
) -> Result<(), ParquetError> {
    let values: Vec<i64> = values.collect();
    let mut column = next(group)?;
    column.typed::<Int64Type>().write_batch(&values, None, None)?;
    column.close()
}

impl<W: Write + Send> Table for Parquet<W> {
    fn row(&mut self, record: &Record) -> std::io::Result<()> {
        self.rows.push(*record);
        if self.rows.len() == GROUP { self.write().map_err(failed) } else { Ok(()) }
    }

    fn end(mut self: Box<Self>) -> std::io::Result<()> {
        if !self.rows.is_empty() {
            self.write().map_err(failed)?;
        }
        self.writer.finish().map(drop).map_err(failed)
    }
}
