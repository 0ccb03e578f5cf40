//! The asking end of the control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// Longest answer, in bytes.
const ANSWER_MAX: u64 = 16 * 1024 * 1024;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the control socket.
    #[error("no warmswap answers at {path}: {source}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The connection ended in the middle.
    #[error("the connection to warmswap ended: {0}")]
    Ended(std::io::Error),
    /// It answered with an error.
    #[error("{message}")]
    Refused {
        /// Exit code for the command line.
        code: u8,
        /// The reason.
        message: String,
    },
}

/// A connection to a control socket, good for many commands.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the control socket of one device.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream =
            UnixStream::connect(path).map_err(|source| ClientError::Unreachable { path: path.to_owned(), source })?;
        Ok(Client { reader: BufReader::new(stream) })
    }

    /// Gives up on an answer that takes longer than this; none waits for ever.
    ///
    /// # Errors
    /// The system refuses.
    pub fn set_patience(&mut self, patience: Option<std::time::Duration>) -> std::io::Result<()> {
        self.reader.get_mut().set_read_timeout(patience)
    }

    /// Sends a command and reads one answer.
    ///
    /// # Errors
    /// The connection ended, or the answer is an error.
    pub fn ask(&mut self, command: &Value) -> Result<Value, ClientError> {
        self.tell(command)?;
        self.line()
    }

    /// Sends a command whose answers are read one by one.
    ///
    /// # Errors
    /// The connection ended.
    pub fn tell(&mut self, command: &Value) -> Result<(), ClientError> {
        writeln!(self.reader.get_mut(), "{command}").map_err(ClientError::Ended)
    }

    /// Reads one more answer to a command that has several.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn line(&mut self) -> Result<Value, ClientError> {
        Ok(self.line_as_sent()?.0)
    }

    /// The same, together with the text of the answer, in which the order of members is the sender's.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn line_as_sent(&mut self) -> Result<(Value, String), ClientError> {
        let mut line = String::new();
        // What is cut is no JSON.
        let mut reader = std::io::Read::take(&mut self.reader, ANSWER_MAX);
        let read = reader.read_line(&mut line).map_err(ClientError::Ended)?;
        if read == 0 {
            return Err(ClientError::Ended(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let value: Value = serde_json::from_str(&line)
            .map_err(|error| ClientError::Ended(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))?;
        match value.get("error") {
            Some(error) => Err(ClientError::Refused {
                code: error["code"].as_u64().and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
                message: error["message"].as_str().unwrap_or("no reason was given").to_owned(),
            }),
            None => Ok((value, line)),
        }
    }

    /// Status of everything behind the socket.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn status(&mut self) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "status"}))
    }

    /// Has the shadow replaced by one that is newly started. Answers with the generation of the one that goes.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn refresh(&mut self, device: &str) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "refresh", "device": device}))
    }

    /// Makes a failover and waits for its end.
    ///
    /// # Errors
    /// As [`Client::ask`]. A refused failover is an answer, not an error.
    pub fn failover(&mut self, device: &str, now: bool, reason: &str) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "failover", "device": device, "now": now, "reason": reason}))
    }
}
